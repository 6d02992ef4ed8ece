"""Tokenised rows → a DataLoader of `PackedBatch`es."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lit_align.batch import PackedBatch
from lit_align.data.packing import FILLER_ROW_ID
from lit_align.data.sampler import BatchSampler
from lit_align.data.schema import TokenizedRow
from lit_align.data.shared_prefix import Layout, collator


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


class ResumableDataLoader(DataLoader[PackedBatch]):
    """A DataLoader whose place within the epoch is part of a checkpoint: Lightning asks for it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_yielded = 0

    def __iter__(self) -> Iterator[PackedBatch]:  # type: ignore[override]
        # Begins at the first `next`, when Lightning has told the sampler its epoch.
        for batch in super().__iter__():
            self._num_yielded += 1
            yield batch
        self._num_yielded = 0

    def state_dict(self) -> dict[str, int]:
        """How many batches of the epoch have been handed out."""
        return {"num_batches": self._num_yielded % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after those batches."""
        self._num_yielded = state["num_batches"]
        assert isinstance(self.sampler, BatchSampler)
        self.sampler.skip_batches(self._num_yielded)


def make_dataloader(
    rows: Sequence[TokenizedRow],
    sampler: BatchSampler,
    pad_id: int,
    num_workers: int = 0,
    layout: Layout = "padded",
) -> ResumableDataLoader:
    """Batches of `rows` as the sampler makes them up."""
    return ResumableDataLoader(
        TokenizedRows(rows),  # type: ignore[arg-type]
        batch_size=None,  # the sampler yields whole batches
        sampler=sampler,  # type: ignore[arg-type]
        collate_fn=collator(layout, pad_id),  # type: ignore[arg-type]
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
