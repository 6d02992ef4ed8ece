"""ILA's stage 2: which layers of a fine-tuning matter (arXiv 2410.17875, Eq. 7)."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_align.batch import PackedBatch
from lit_align.compact.change import change_checksum, read_change
from lit_align.compact.gates import LayerGates, closed_gates, gate, layer_gates, weight_shapes
from lit_align.errors import TrainingError
from lit_align.localizers.layer_gate import LayerScores
from lit_align.masks.linear_layers import linear_layers
from lit_align.modules.base import LanguageModelModule, Objective
from lit_align.modules.loaded import check_choice
from lit_align.modules.masked_dpo import MaskedDPO
from lit_align.modules.metric_log import MetricLog
from lit_align.modules.sft import SupervisedFineTuning

Loss = Literal["sft", "dpo"]
ScoreOptimizer = Literal["gradient_descent", "adamw"]
LEARNING_RATES = {"gradient_descent": 100.0, "adamw": 0.05}
SCORES_FILE = "scores.json"


class ILAMaskLearning(LanguageModelModule):
    """Learns a score s_i for every linear layer that a fine-tuning changed; the rest is frozen.

    The model is θ_0,i + σ(s_i)·Δθ_i; the loss is minimised over s alone. At the end the scores are
    written to `scores`; `KeyParameterLocalization(method="layer_gate")` makes a mask of them.
    """

    def __init__(
        self,
        model: str,
        change: str,
        *,
        loss: Loss = "sft",
        beta: float = 0.1,
        initial_score: float = 4.0,
        budget: float | None = None,
        budget_weight: float = 1.0,
        optimizer: ScoreOptimizer = "gradient_descent",
        learning_rate: float | None = None,
        lr_scheduler: str = "constant",
        warmup_ratio: float = 0.0,
        scores: str | None = None,
        **settings: Any,
    ) -> None:
        """Settings of the gates, and those of every module.

        Args:
            model: local folder, hub id or alias of the base.
            change: folder of what fine-tuning made of it: adapters, a delta, or the task model.
            loss: of the fine-tuning; with dpo, the base (γ = 0) is the reference.
            beta: of DPO.
            initial_score: s_0; σ(4) = 0.982.
            budget: H of ‖γ‖ < H as a share of the layers: a mean gate above it is penalised; None:
                no budget (the paper's Eq. 7).
            budget_weight: factor on max(0, mean γ − H).
            optimizer: of the scores; the paper's gradient descent, whose ranking follows the size
                of the gradients and hardly the learning rate. AdamW divides that size away: layers
                are then ranked by how steady their gradient is.
            learning_rate: of the scores; default 100 (0.05 for adamw): large, since σ'(4) = 0.018
                makes their gradients small. In 128 steps scores move by some tenths on average.
            lr_scheduler: a name that `transformers.get_scheduler` knows.
            warmup_ratio: share of all steps with linear warm-up.
            scores: file for the scores; default `scores.json` in the run's folder.
            **settings: see `LanguageModelModule`.

        Raises:
            TrainingError: a setting that cannot be.
        """
        check_choice("loss", loss, get_args(Loss))
        check_choice("optimizer", optimizer, get_args(ScoreOptimizer))
        if budget is not None and not 0 <= budget <= 1:
            raise TrainingError(f"budget {budget} is a share of the layers, in [0, 1]")
        if not (math.isfinite(initial_score) and budget_weight >= 0):
            raise TrainingError(
                f"initial_score {initial_score} must be finite, budget_weight {budget_weight} >= 0"
            )
        if optimizer == "gradient_descent" and settings.get("weight_decay"):
            raise TrainingError("weight_decay is AdamW's: leave it out, or set optimizer adamw")
        if settings.get("adapter") is not None:
            raise TrainingError(
                "ILAMaskLearning trains nothing but scores: give the adapters' folder as change"
            )
        learning_rate = LEARNING_RATES[optimizer] if learning_rate is None else learning_rate
        super().__init__(
            model,
            learning_rate=learning_rate,
            lr_scheduler=lr_scheduler,
            warmup_ratio=warmup_ratio,
            **settings,
        )
        self.save_hyperparameters()
        of_loss: LanguageModelModule = (
            SupervisedFineTuning(model) if loss == "sft" else MaskedDPO(model, beta=beta)
        )
        self._of_loss = (of_loss,)  # in a tuple: no submodule
        self.uses_reference = of_loss.uses_reference  # type: ignore[misc]
        self.sequences_together = of_loss.sequences_together
        self.logs = {split: MetricLog(of_loss.reported_names) for split in self.logs}
        self.reported_names = of_loss.reported_names  # type: ignore[misc]

    def objective(
        self, batch: PackedBatch, per_token_logps: Tensor, ref_per_token_logps: Tensor | None
    ) -> Objective:
        """That of the fine-tuning's loss."""
        return self._of_loss[0].objective(batch, per_token_logps, ref_per_token_logps)

    def _restrict(self, dtype: torch.dtype) -> None:
        """Gates in place of a mask: only the scores train."""
        if self.mask is not None:
            raise TrainingError(
                "ILAMaskLearning learns which layers matter and takes no mask: leave the callback "
                "out, or give it method layer_gate and no scores file"
            )
        h: Any = self.hparams
        change = read_change(h.change, self.model)
        keep_base = self.uses_reference and h.reference == "swap"
        gate(self.model, change, initial_score=h.initial_score, keep_base=keep_base)

    @property
    def gates(self) -> LayerGates:
        """The gates, once the model is loaded."""
        return layer_gates(self.model)

    def trained_share(self) -> float:
        """Scores, as a share of the base's parameters."""
        total = sum(math.prod(shape) for shape in weight_shapes(self.model).values())
        return len(self.gates.modules) / total

    def reference_context(self) -> AbstractContextManager[None]:
        """The base: all gates closed."""
        return closed_gates(self.model)

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """The loss, and the penalty of the budget."""
        before = self.units
        loss = super().training_step(batch, batch_idx)
        h: Any = self.hparams
        if h.budget is None:
            return loss
        penalty = h.budget_weight * (self.gates.values().mean() - h.budget).clamp(min=0)
        # The step divides by the window's units: so they are in it.
        units = self.units - before.to(self.units.device)
        return (
            loss + penalty * units * self.trainer.accumulate_grad_batches * self.trainer.world_size
        )

    def configure_optimizers(self) -> Any:
        """Gradient descent on the scores (or AdamW), and the schedule, by step."""
        h: Any = self.hparams
        if h.optimizer == "adamw":
            return super().configure_optimizers()
        optimizer = torch.optim.SGD(self.gates.parameters().values(), lr=h.learning_rate)
        return self.with_schedule(optimizer)

    def _identity(self) -> dict[str, str | None]:
        return super()._identity() | {"change": change_checksum(self.settings.change)}

    def layer_scores(self) -> LayerScores:
        """The scores as they stand."""
        h, gates = self.settings, self.gates
        return LayerScores(
            gates.scores(),
            base_fingerprint=getattr(self.model, "base_fingerprint", None),
            initial_score=h.initial_score,
            change=str(h.change),
            loss=h.loss,
            steps=self.global_step,
            unscored=tuple(n for n in linear_layers(self.model) if n not in gates.modules),
            extra={"optimizer": h.optimizer, "learning_rate": h.learning_rate, "budget": h.budget},
        )

    def on_train_end(self) -> None:
        """Write the scores."""
        super().on_train_end()
        scores = self.layer_scores()
        if scores.saturated:
            rank_zero_warn(
                f"all {len(scores.layers)} gates are within 0.01 of 0 or 1 after {scores.steps} "
                "steps: next to no gradient is left, and the scores' order is that of their way "
                "there; lower learning_rate, or set a budget"
            )
        if self.trainer.is_global_zero:
            path = Path(self.settings.scores or Path(self.trainer.default_root_dir) / SCORES_FILE)
            scores.write(path)
            rank_zero_info(f"scores of {len(scores.layers)} layers: {path}")
