"""Tokenised rows → a DataLoader of `PackedBatch`es."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch.utils.data import DataLoader, Dataset

from lit_align.batch import PackedBatch
from lit_align.data.packing import FILLER_ROW_ID, collate
from lit_align.data.sampler import BatchSampler
from lit_align.data.schema import TokenizedRow


class TokenizedRows(Dataset[list[TokenizedRow]]):
    """Rows looked up a batch at a time; a negative index `~i` is a filler copy of row i."""

    def __init__(self, rows: Sequence[TokenizedRow]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: list[int]) -> list[TokenizedRow]:
        return [
            self.rows[i] if i >= 0 else dataclasses.replace(self.rows[~i], row_id=FILLER_ROW_ID)
            for i in indices
        ]


def make_dataloader(
    rows: Sequence[TokenizedRow], sampler: BatchSampler, pad_id: int, num_workers: int = 0
) -> DataLoader[PackedBatch]:
    """Batches of `rows` as the sampler makes them up."""
    return DataLoader(
        TokenizedRows(rows),  # type: ignore[arg-type]
        batch_size=None,  # the sampler yields whole batches
        sampler=sampler,  # type: ignore[arg-type]
        collate_fn=functools.partial(collate, pad_id=pad_id),  # type: ignore[arg-type]
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
