"""What a fine-tuning has changed by then, kept at shares of its steps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning
from torch import nn

from lit_align.compact.change import save_change
from lit_align.errors import TrainingError
from lit_align.files import write_atomically
from lit_align.shards import refuse_shards


class KeepMilestones(lightning.Callback):
    """Save the change at shares of a fit's steps: ILA's milestones (arXiv 2410.17875, Table 4).

    `folder` gets a folder for each, named by per cent (`1`, `25`, `100`), and `milestones.json`:
    what stands where, and after how many steps. A fit that ends early lacks the later ones.

    Attributes:
        steps: share → the step after which it is kept; known when training begins.
    """

    def __init__(
        self,
        fractions: Sequence[float] = (0.01, 0.25, 0.5, 0.75, 1.0),
        folder: str | None = None,
        *,
        save: Callable[[nn.Module, Path], Any] = save_change,
    ) -> None:
        """What to keep.

        Args:
            fractions: shares of all optimiser steps, in (0, 1]; each is at least one step.
            folder: default `milestones` in the run's folder.
            save: writes a model's change into a folder.

        Raises:
            TrainingError: no share, or one out of range.
        """
        if not fractions or not all(0 < f <= 1 for f in fractions):
            raise TrainingError(f"milestones are shares of the steps in (0, 1], not {fractions}")
        self.fractions, self.folder, self.save = tuple(fractions), folder, save
        self.steps: dict[float, int] = {}
        self._last_step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Place the milestones.

        Raises:
            ModelError: the model is sharded.
        """
        refuse_shards(pl_module.model, "no milestones are kept")
        total = int(trainer.estimated_stepping_batches)
        self.steps = {f: max(1, math.ceil(f * total - 1e-9)) for f in self.fractions}

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save what is due after the step that this batch ended."""
        if trainer.global_step == self._last_step or not trainer.is_global_zero:
            return  # amid an accumulation window
        self._last_step = trainer.global_step
        due = [f for f, step in self.steps.items() if step == trainer.global_step]
        root = Path(self.folder or Path(trainer.default_root_dir) / "milestones")
        for fraction in due:
            root.mkdir(parents=True, exist_ok=True)
            self.save(pl_module.model, root / milestone_name(fraction))
        if due:
            self._write_record(trainer, root)

    def _write_record(self, trainer: lightning.Trainer, root: Path) -> None:
        kept = {
            milestone_name(f): {"fraction": f, "step": step}
            for f, step in self.steps.items()
            if step <= trainer.global_step
        }
        record = {"steps": int(trainer.estimated_stepping_batches), "milestones": kept}
        write_atomically(root / "milestones.json", json.dumps(record, indent=2).encode() + b"\n")


def milestone_name(fraction: float) -> str:
    """Its folder's name, in per cent: 0.25 → `25`, 0.125 → `12_5`."""
    return f"{100 * fraction:g}".replace(".", "_")
