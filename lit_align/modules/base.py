"""What the modules of all objectives share: the loss of a batch, and the steps."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from lit_align.batch import PackedBatch
from lit_align.compact.rank_allocation import allocates_ranks, orthogonality
from lit_align.errors import TrainingError
from lit_align.modules.forward import (
    loss_and_logps,
    per_token_logps,
    per_token_logps_with_statistics,
)
from lit_align.modules.loaded import LoadedModule
from lit_align.modules.metric_log import Reported, masked_mean
from lit_align_kernels.weighted_preference_loss import ChunkLoss, TokenNPO


@dataclasses.dataclass
class Objective:
    """What a batch contributes.

    Attributes:
        loss_sum: scalar with gradient, the sum of the loss over the batch's units.
        units: scalar, how many there are (pairs, sequences or tokens): the loss is the sum over the
            whole accumulation window and all ranks divided by their units.
        reported: name → (mean, weight), for the log.
    """

    loss_sum: Tensor
    units: Tensor
    reported: Reported


class LanguageModelModule(LoadedModule):
    """Base of the training objectives; `objective` is all that a subclass has to add.

    `LoadedModule` loads the model and takes the settings; checkpoints hold the trainable entries
    alone.
    """

    # How many neighbouring sequences a unit of the loss needs (a pair: 2), where the loss is a sum
    # over such units of what their own log-probs give: it then takes one pass over the head, a
    # chunk of units at a time. None: it needs the whole batch, or more than log-probs.
    sequences_together: int | None = None

    # ---- the objective -----------------------------------------------------------------------

    def objective(
        self, batch: PackedBatch, per_token_logps: Tensor, ref_per_token_logps: Tensor | None
    ) -> Objective:
        """The loss of a batch from the log-probs of its targets, each (N,)."""
        raise NotImplementedError

    def chunk_loss(self, batch: PackedBatch, reference: Tensor | None) -> TokenNPO | ChunkLoss:
        """The objective's loss by chunks of whole sequences; without a reference π_ref is π."""

        def loss(logps: Tensor, start: int, stop: int) -> Tensor:
            ref = self._reference_or_self(
                logps, None if reference is None else reference[start:stop]
            )
            part = batch.sequences_of_targets(start, stop, self.sequences_together or 1)
            return self.objective(part, logps, ref).loss_sum

        return loss

    def _reference_or_self(self, logps: Tensor, reference: Tensor | None) -> Tensor | None:
        return logps.detach() if self.uses_reference and reference is None else reference

    def _objective(self, batch: PackedBatch, reference: Tensor | None) -> Objective:
        """The objective with its gradient; the head's product is formed once where it can be."""
        together = self.sequences_together
        # 16-mixed multiplies the loss before the backward, which one pass would come too early for.
        if together is None or self.trainer.precision == "16-mixed":
            logps = per_token_logps(self.model, batch)
            return self.objective(batch, logps, self._reference_or_self(logps, reference))
        chunk_loss = self.chunk_loss(batch, reference)
        loss_sum, logps = loss_and_logps(self.model, batch, chunk_loss, together)
        with torch.no_grad():  # units and what is reported, of all chunks together
            found = self.objective(batch, logps, self._reference_or_self(logps, reference))
        return dataclasses.replace(found, loss_sum=loss_sum)

    def localization_loss(self, batch: PackedBatch) -> Tensor:
        """The loss at θ with the policy itself as reference: what gradient localisation follows.

        With `reference: none`, of the loss without one. A sum over the batch's units, so that the
        scores do not depend on how rows are batched.
        """
        reference = self.reference_per_token_logps(batch) if self.reference_free else None
        return self._objective(batch, reference).loss_sum

    # ---- steps -------------------------------------------------------------------------------

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """The batch's loss, scaled so that dividing by the window's units gives the exact mean."""
        self.throughput.start_batch()
        reference = self.reference_per_token_logps(batch)  # before the policy's graph exists
        if self.logs_next_step():
            logps, reported = self._with_statistics(batch)
            objective = self.objective(batch, logps, reference)
        else:
            objective, reported = self._objective(batch, reference), {}
        self._take_note(objective, reported, batch)
        loss_sum = objective.loss_sum
        if allocates_ranks(self.model):  # the step divides by the units
            loss_sum = loss_sum + objective.units * orthogonality(self.model)
        # Lightning divides by the number of micro-batches and averages over ranks: both undone.
        return loss_sum * self.trainer.accumulate_grad_batches * self.trainer.world_size

    @torch.compiler.disable  # Dynamo cannot follow Lightning's `log`
    def _take_note(self, objective: Objective, reported: Reported, batch: PackedBatch) -> None:
        """Check the loss, count the window's units, report."""
        self._check_finite(objective.loss_sum, batch)
        device = objective.units.device
        self.units = self.units.to(device) + objective.units.detach()
        self.loss_sum = self.loss_sum.to(device) + objective.loss_sum.detach()
        self.log_of("train").update(objective.reported | reported)
        self.throughput.add(batch.num_tokens)
        mean = objective.loss_sum.detach() / objective.units.clamp(min=1)
        self.log("loss", mean, prog_bar=True, logger=False)

    def _check_finite(self, loss: Tensor, batch: PackedBatch) -> None:
        if not loss.isfinite():
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.global_step}, rows "
                f"{sorted(set(batch.row_ids.tolist()))} of the training split; no step was taken "
                "and the last checkpoint is as it was"
            )

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Report the objective and its statistics."""
        self._evaluate(batch, "val")

    def test_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Report the objective and its statistics."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: PackedBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One record a sequence: row id, role, tokens, log-prob, and the reference's if any."""
        reference = None if self.reference_free else self.reference_per_token_logps(batch)
        logps = per_token_logps(self.model, batch)
        records = []
        for sequence, row in enumerate(batch.row_ids.tolist()):
            at = batch.sequence_index == sequence
            record = {
                "row_id": row,
                "role": ("chosen", "rejected")[int(batch.sequence_roles[sequence])],
                "num_tokens": int(at.sum()),
                "logp": float(logps[at].sum()),
            }
            if reference is not None:
                record["ref_logp"] = float(reference[at].sum())
            if row >= 0:
                records.append(record)
        return records

    def _evaluate(self, batch: PackedBatch, split: str) -> None:
        reference = self.reference_per_token_logps(batch)
        logps, reported = self._with_statistics(batch)
        objective = self.objective(batch, logps, reference)
        self.log_of(split).update(objective.reported | reported)

    def _with_statistics(self, batch: PackedBatch) -> tuple[Tensor, Reported]:
        """Per-token log-probs, and entropy, accuracy and mean logits under TRL's names."""
        logps, s = per_token_logps_with_statistics(self.model, batch)
        valid = (batch.row_ids >= 0)[batch.sequence_index]
        rejected = (batch.sequence_roles == 1)[batch.sequence_index]
        reported: Reported = {
            "entropy": masked_mean(s.entropy_nats, valid),
            "mean_token_accuracy": masked_mean(s.is_argmax.float(), valid),
            "logits/chosen": masked_mean(s.mean_logit, valid & ~rejected),
            "logits/rejected": masked_mean(s.mean_logit, valid & rejected),
        }
        return logps, {n: v for n, v in reported.items() if n in self.reported_names}
