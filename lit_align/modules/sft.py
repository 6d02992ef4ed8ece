"""Supervised fine-tuning; on the rewriting task it trains the token reward model."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lit_align.batch import PackedBatch
from lit_align.losses import sft_loss
from lit_align.modules.base import LanguageModelModule, Objective


class SupervisedFineTuning(LanguageModelModule):
    """Mean negative log-likelihood over target tokens (weighted by `token_weights`)."""

    sequences_together = 1
    reported_names: ClassVar = ("loss", "entropy", "mean_token_accuracy", "grad_norm")

    def objective(
        self, batch: PackedBatch, per_token_logps: Tensor, ref_per_token_logps: Tensor | None
    ) -> Objective:
        """Units are the weights of the target tokens."""
        units = batch.token_weights.sum()
        loss = sft_loss(per_token_logps, batch.token_weights)
        return Objective(loss * units, units, {"loss": (loss, units)})
