"""Direct preference optimisation, with ALLO's token filter where asked."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_align.batch import PackedBatch
from lit_align.errors import TrainingError
from lit_align.losses import (
    DPOLossType,
    TokenFilter,
    check_dpo_settings,
    dpo_loss,
    sequence_lengths,
    sequence_logps,
)
from lit_align.losses.token_filter import FilterSide
from lit_align.modules.base import LanguageModelModule, Objective


class MaskedDPO(LanguageModelModule):
    """DPO; restricted to a mask where a callback brings one, full training otherwise.

    With a token filter it is ALLO's improving stage: logits = Σ_t q_t^c·Δ_t^c − Σ_t q_t^r·Δ_t^r.
    """

    uses_reference: ClassVar = True
    sequences_together = 2
    reported_names: ClassVar = (
        "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
        "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected", "entropy",
        "mean_token_accuracy", "filter/kept_fraction", "grad_norm",
    )  # fmt: skip

    def __init__(
        self,
        model: str,
        *,
        beta: float = 0.1,
        loss_type: DPOLossType = "sigmoid",
        label_smoothing: float = 0.0,
        filter_side: FilterSide = "both",
        filter_drop_fraction: float | None = None,
        filter_keep_fraction: float | None = None,
        **settings: Any,
    ) -> None:
        """Settings of the loss, and those of every module.

        Args:
            model: local folder, hub id or alias.
            beta: strength of the pull towards the reference.
            loss_type: sigmoid, hinge, ipo or robust.
            label_smoothing: share of labels taken to be wrong.
            filter_side: whose tokens the filter looks at.
            filter_drop_fraction: drop the tokens with the highest reward, this share of a response.
            filter_keep_fraction: keep only the share with the lowest reward (the public code).
            **settings: see `LanguageModelModule`.

        Raises:
            TrainingError: a setting that the loss does not take.
        """
        try:
            check_dpo_settings(beta, label_smoothing, loss_type)
        except ValueError as error:
            raise TrainingError(str(error)) from error
        super().__init__(model, **settings)
        self.save_hyperparameters()
        wanted = filter_drop_fraction is not None or filter_keep_fraction is not None
        self.token_filter = (
            TokenFilter(filter_side, filter_drop_fraction, filter_keep_fraction) if wanted else None
        )

    def objective(
        self, batch: PackedBatch, per_token_logps: Tensor, ref_per_token_logps: Tensor | None
    ) -> Objective:
        """Units are pairs; the sequences 2i and 2i + 1 are a pair's chosen and rejected."""
        assert ref_per_token_logps is not None
        weights = self._weights(batch, per_token_logps.detach() - ref_per_token_logps)
        policy = self._by_sequence(batch, per_token_logps, weights)
        reference = self._by_sequence(batch, ref_per_token_logps, weights)
        h: Any = self.hparams
        losses, chosen, rejected = dpo_loss(
            policy[0::2], policy[1::2], reference[0::2], reference[1::2],
            h.beta, h.label_smoothing, h.loss_type,
        )  # fmt: skip
        valid = (batch.row_ids[0::2] >= 0).float()  # filler rows of an uneven rank do not count
        units = valid.sum()

        def mean(values: Tensor) -> tuple[Tensor, Tensor]:
            return (values * valid).sum() / units.clamp(min=1), units

        loss_sum = torch.where(valid > 0, losses, 0.0).sum()
        reported = {
            "loss": (loss_sum / units.clamp(min=1), units),
            "rewards/chosen": mean(chosen),
            "rewards/rejected": mean(rejected),
            "rewards/accuracies": mean((chosen > rejected).float()),
            "rewards/margins": mean(chosen - rejected),
            "logps/chosen": mean(policy[0::2].detach()),
            "logps/rejected": mean(policy[1::2].detach()),
        }
        if self.token_filter is not None:
            targets = torch.tensor(weights.numel(), device=weights.device)
            reported["filter/kept_fraction"] = ((weights != 0).float().mean(), targets)
        return Objective(loss_sum, units, reported)

    def _weights(self, batch: PackedBatch, rewards: Tensor) -> Tensor:
        if self.token_filter is None:
            return batch.token_weights
        is_rejected = batch.sequence_roles == 1
        return batch.token_weights * self.token_filter.weights(
            rewards, batch.sequence_index, is_rejected, batch.token_weights != 0
        )

    def _by_sequence(self, batch: PackedBatch, logps: Tensor, weights: Tensor) -> Tensor:
        sums = sequence_logps(logps, batch.sequence_index, batch.num_sequences, weights)
        if self.settings.loss_type != "ipo":
            return sums
        lengths = sequence_lengths(batch.sequence_index, batch.num_sequences)
        return sums / lengths.clamp(min=1)
