"""Keep what `predict` computes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from lit_align.files import write_atomically


class LogpsWriter(BasePredictionWriter):
    """Write the records of `predict_step` as JSONL, one line a sequence, in row order."""

    def __init__(self, output: str | None = None) -> None:
        """The file to write.

        Args:
            output: default `logps.jsonl` in the run's folder.
        """
        super().__init__(write_interval="epoch")
        self.output = output

    def write_on_epoch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Gather from all ranks and write on the first."""
        records = [record for batch in predictions for record in batch]
        if torch.distributed.is_initialized():
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, records)
            records = [record for part in parts for record in part]
        records.sort(key=lambda record: record["row_id"])
        path = Path(self.output or Path(trainer.default_root_dir) / "logps.jsonl")
        if trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, "".join(json.dumps(r) + "\n" for r in records).encode())
        rank_zero_info(f"log-probs of {len(records)} sequences: {path}")
