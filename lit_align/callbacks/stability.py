"""When a fine-tuning has settled: ILA's ε-stability (arXiv 2410.17875, Definition 1)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_align.errors import TrainingError
from lit_align.files import write_atomically


class StopWhenStable(lightning.Callback):
    """Stop a fit at the step T from which |E[L(θ_t+1)] − E[L(θ_t)]| < ε.

    The expected loss is estimated by the mean training loss of a moving window; its change a step
    is that of two neighbouring windows over the window's length. Of "for all t > T" can be seen
    what has happened: it must hold for a whole window of steps. Steps on which the learning rate
    still rose (the first always) do not count, since a model that hardly learns is stable too. So
    the earliest stop is 3 · window − 1 steps after those.

    Attributes:
        stable_at: the step at which the fit was found stable, or None.
    """

    def __init__(
        self, epsilon: float = 0.01, window: int = 20, *, output: str | None = None
    ) -> None:
        """The test.

        Args:
            epsilon: ε, the largest change of the expected loss a step, in the loss's unit (nats).
            window: optimiser steps that make the mean.
            output: JSON file for what came of it; default `stability.json` in the run's folder.

        Raises:
            TrainingError: epsilon is not > 0, or window not >= 1.
        """
        if not (epsilon > 0 and window >= 1):
            raise TrainingError(f"epsilon {epsilon} must be > 0, window {window} at least 1")
        self.epsilon, self.window, self.output = epsilon, window, output
        self.losses: list[float] = []
        self.stable_at: int | None = None
        self.warmup_steps = 0
        self._last_step, self._last_rate = 0, 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Count from where the run begins or goes on; one that was stable before does not go on."""
        self._last_step = trainer.global_step
        if self.stable_at is not None:
            trainer.should_stop = True

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the loss of the step that this batch ended, and test."""
        if trainer.global_step == self._last_step:
            return  # amid an accumulation window
        self._last_step = trainer.global_step
        self.losses.append(float(pl_module.step_loss))
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        if rate > self._last_rate:
            self.warmup_steps = len(self.losses)
        self._last_rate = rate
        if self.stable_at is None and self.is_stable():
            self.stable_at = trainer.global_step
            trainer.should_stop = True

    def is_stable(self) -> bool:
        """Whether the change a step was below ε in each of the last `window` steps."""
        first = len(self.losses) - self.window + 1
        return first - self.warmup_steps >= 2 * self.window and all(
            abs(self.change_a_step(after)) < self.epsilon
            for after in range(first, len(self.losses) + 1)
        )

    def change_a_step(self, after: int) -> float:
        """The estimate after so many steps (at least 2 · window), in nats a step."""
        w = self.window
        last, before = self.losses[after - w : after], self.losses[after - 2 * w : after - w]
        return (sum(last) - sum(before)) / w**2

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Say and write down what came of it."""
        steps = len(self.losses)
        change = self.change_a_step(steps) if steps >= 2 * self.window else math.nan
        test = f"epsilon {self.epsilon:g} a step over windows of {self.window} steps"
        if self.stable_at is not None:
            rank_zero_info(f"training is stable after {self.stable_at} steps ({test})")
        else:
            rank_zero_warn(
                f"training never became stable ({test}): it ended at its limit of {steps} steps, "
                f"the loss changing by {change:.3g} a step; the change is used as it is"
            )
        if trainer.is_global_zero:
            path = Path(self.output or Path(trainer.default_root_dir) / "stability.json")
            record = {
                "stable": self.stable_at is not None,
                "steps": steps,
                "epsilon": self.epsilon,
                "window": self.window,
                "change_a_step": None if math.isnan(change) else change,
                "warmup_steps": self.warmup_steps,
                "losses": self.losses,
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(record, indent=2).encode() + b"\n")

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        names = ("losses", "stable_at", "warmup_steps")
        return {name: getattr(self, name) for name in names} | {"last_rate": self._last_rate}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.losses = list(state_dict["losses"])
        self.stable_at = state_dict["stable_at"]
        self.warmup_steps, self._last_rate = state_dict["warmup_steps"], state_dict["last_rate"]
