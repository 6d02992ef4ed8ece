"""Forgetting wrong responses: token-weighted or per-sequence NPO, with a retain term if asked."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_align.batch import PackedBatch
from lit_align.compact import reference_policy
from lit_align.errors import TrainingError
from lit_align.losses import npo_loss, sequence_lengths, sequence_logps, token_npo_losses
from lit_align.modules.base import LanguageModelModule, Objective
from lit_align.modules.forward import scaled_logits, target_hidden
from lit_align.modules.loaded import check_choice
from lit_align_kernels.weighted_preference_loss import ChunkLoss, TokenNPO

KL_CHUNK = 128  # retained tokens whose full distributions exist at once


class TokenWeightedNPO(LanguageModelModule):
    """ALLO's forgetting stage on responses of role REJECTED.

    `loss_type: token` is Σ_t r_t·[−logσ(−βΔ_t)] / #(r ≠ 0); `sequence` is the original NPO,
    −(2/β)·logσ(−β·ΣΔ_t), averaged over responses. Responses of role CHOSEN are retained: their
    negative log-likelihood or KL(π_ref ‖ π) joins the sum, `retain_weight` being the weight of one
    retained unit (token or response) against one forgotten unit; the mean is over both.
    """

    uses_reference: ClassVar = True
    reported_names: ClassVar = (
        "loss", "forget_loss", "retain_loss", "logps/rejected", "logps/chosen", "rewards/rejected",
        "logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy", "grad_norm",
    )  # fmt: skip

    def __init__(
        self,
        model: str,
        *,
        beta: float = 0.1,
        loss_type: Literal["token", "sequence"] = "token",
        retain: Literal["none", "nll", "kl"] = "none",
        retain_weight: float = 1.0,
        **settings: Any,
    ) -> None:
        """Settings of the loss, and those of every module.

        Args:
            model: local folder, hub id or alias.
            beta: of NPO.
            loss_type: per weighted token (ALLO) or per response (the original).
            retain: what keeps good responses as they are; `kl` needs `reference: swap`.
            retain_weight: see the class.
            **settings: see `LanguageModelModule`.

        Raises:
            TrainingError: beta is not > 0, an unknown loss_type or retain, or `retain: kl` without
                `reference: swap`.
        """
        if not beta > 0:
            raise TrainingError(f"beta {beta} must be > 0")
        check_choice("loss_type", loss_type, ("token", "sequence"))
        check_choice("retain", retain, ("none", "nll", "kl"))
        super().__init__(model, **settings)
        self.save_hyperparameters()
        if retain == "kl" and self.settings.reference != "swap":
            raise TrainingError("retain: kl compares whole distributions: set reference: swap")
        # KL compares whole distributions, on hidden states of its own.
        self.sequences_together = None if retain == "kl" else 1
        self._ref_distributions: Tensor | None = None  # (retained, V) of the batch in hand

    def objective(
        self, batch: PackedBatch, per_token_logps: Tensor, ref_per_token_logps: Tensor | None
    ) -> Objective:
        """Units are tokens of weight ≠ 0, or responses."""
        assert ref_per_token_logps is not None
        h: Any = self.hparams
        retained = self._retained(batch)
        forget = batch.token_weights - retained
        by_token = h.loss_type == "token"
        if by_token:
            losses = token_npo_losses(per_token_logps, ref_per_token_logps, h.beta)
            forget_sum, forget_units = (forget * losses).sum(), (forget != 0).sum()
        else:
            forget_sum, forget_units = self._sequence_npo(
                batch, per_token_logps, ref_per_token_logps
            )
        loss_sum, units = forget_sum, forget_units
        reported = {
            "forget_loss": (forget_sum / forget_units.clamp(min=1), forget_units),
            **self._logp_reports(batch, per_token_logps, ref_per_token_logps),
        }
        if h.retain != "none":
            retain_sum, retain_units = self._retain(batch, per_token_logps, retained, by_token)
            loss_sum = loss_sum + h.retain_weight * retain_sum
            units = units + retain_units
            mean = retain_sum / retain_units.clamp(min=1)
            reported["retain_loss"] = (mean, retain_units)
        reported["loss"] = (loss_sum / units.clamp(min=1), units)
        return Objective(loss_sum, units, reported)

    def chunk_loss(self, batch: PackedBatch, reference: Tensor | None) -> TokenNPO | ChunkLoss:
        """Token NPO alone is separable by token, and one kernel on a GPU."""
        h: Any = self.settings
        if reference is None or h.loss_type != "token" or h.retain != "none":
            return super().chunk_loss(batch, reference)
        return TokenNPO(h.beta, reference, batch.token_weights - self._retained(batch))

    def _valid(self, batch: PackedBatch, role: int) -> Tensor:
        """(S,) fp32, 1 for the real sequences of a role."""
        return ((batch.sequence_roles == role) & (batch.row_ids >= 0)).float()

    def _sequence_npo(
        self, batch: PackedBatch, logps: Tensor, ref_logps: Tensor
    ) -> tuple[Tensor, Tensor]:
        index, count = batch.sequence_index, batch.num_sequences
        policy = sequence_logps(logps, index, count, batch.token_weights)
        reference = sequence_logps(ref_logps, index, count, batch.token_weights)
        valid = self._valid(batch, role=1)
        return (npo_loss(policy, reference, self.settings.beta) * valid).sum(), valid.sum()

    def _retain(
        self, batch: PackedBatch, logps: Tensor, weights: Tensor, by_token: bool
    ) -> tuple[Tensor, Tensor]:
        """Sum of the retain term over its units, and how many those are."""
        per_token = -logps if self.settings.retain == "nll" else self._kl(batch, weights)
        if by_token:
            return (weights * per_token).sum(), (weights != 0).sum()
        index, count = batch.sequence_index, batch.num_sequences
        sums = sequence_logps(per_token, index, count, weights)
        means = sums / sequence_lengths(index, count).clamp(min=1)
        valid = self._valid(batch, role=0)
        return (means * valid).sum(), valid.sum()

    def reference_per_token_logps(self, batch: PackedBatch) -> Tensor | None:
        """(N,); `retain: kl` also keeps the reference's distributions for the objective."""
        if self.settings.retain == "kl":
            at = self._retained(batch).nonzero()[:, 0]
            with reference_policy(self.model):
                self._ref_distributions = self._head_logps(target_hidden(self.model, batch)[at])
        return super().reference_per_token_logps(batch)

    def _retained(self, batch: PackedBatch) -> Tensor:
        """(N,) weights of the retained targets."""
        return batch.token_weights * (batch.sequence_roles[batch.sequence_index] == 0)

    def _kl(self, batch: PackedBatch, weights: Tensor) -> Tensor:
        """KL(π_ref ‖ π) at every retained target, 0 elsewhere: (N,)."""
        at = weights.nonzero()[:, 0]
        ref, self._ref_distributions = self._ref_distributions, None
        if ref is None or not at.numel():  # localisation: at θ itself KL and its gradient are 0
            return torch.zeros_like(weights)
        hidden = target_hidden(self.model, batch)[at]
        parts = [
            checkpoint(self._kl_of, h, r, use_reentrant=False)
            for h, r in zip(hidden.split(KL_CHUNK), ref.split(KL_CHUNK), strict=True)
        ]
        return torch.zeros_like(weights).index_put((at,), torch.cat(parts))

    def _head_logps(self, hidden: Tensor) -> Tensor:
        logits = self.model.get_output_embeddings()(hidden).float()
        return F.log_softmax(scaled_logits(self.model, logits), dim=-1)

    def _kl_of(self, hidden: Tensor, ref_logps: Tensor) -> Tensor:
        logps = self._head_logps(hidden)
        return F.kl_div(logps, ref_logps, reduction="none", log_target=True).sum(-1)

    def _logp_reports(
        self, batch: PackedBatch, logps: Tensor, ref_logps: Tensor
    ) -> dict[str, tuple[Tensor, Tensor]]:
        index, count = batch.sequence_index, batch.num_sequences
        sums = sequence_logps(logps.detach(), index, count)
        rewards = self.settings.beta * (sums - sequence_logps(ref_logps, index, count))
        forget, retained = self._valid(batch, role=1), self._valid(batch, role=0)

        def mean(values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
            return (values * valid).sum() / valid.sum().clamp(min=1), valid.sum()

        return {
            "logps/rejected": mean(sums, forget),
            "logps/chosen": mean(sums, retained),
            "rewards/rejected": mean(rewards, forget),
        }
