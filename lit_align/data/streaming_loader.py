"""Batches of a stream for a Trainer: the place within an epoch, and bad rows as they are met."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from lit_align.batch import PackedBatch
from lit_align.data.bad_rows import REJECTED_FILE, BadRow, BadRows, as_line
from lit_align.data.files import read_rows
from lit_align.data.streaming import StreamedBatch, StreamedRows
from lit_align.errors import DataError

T = TypeVar("T")
NEEDS_ALL_ROWS = (
    "are streamed, and this needs them all at once. Reference log-probs are such a case: set "
    "reference: swap, or streaming: false"
)


class StreamingLoader:
    """Batches of a stream whose place within the epoch is part of a checkpoint.

    No DataLoader, so that Lightning takes it as it is: it holds one. Lightning fetches a batch
    ahead, to find the end of a stream of unknown length: so the place counts the batches that were
    taken (`count_batch`), not those handed out.
    """

    def __init__(
        self,
        dataset: StreamedRows,
        num_workers: int,
        epoch: Callable[[], int],
        on_bad_rows: Callable[[list[BadRow]], None],
    ) -> None:
        """A loader of one split.

        Args:
            dataset: this rank's batches.
            num_workers: processes that read and tokenise.
            epoch: tells the epoch whenever the stream begins anew.
            on_bad_rows: called with the bad rows that were met, before the batch is handed out.
        """
        self.dataset = dataset
        self._loader: DataLoader[StreamedBatch] = DataLoader(
            dataset,
            batch_size=None,  # the stream yields whole batches
            collate_fn=_as_it_is,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
        )
        self._epoch, self._on_bad_rows = epoch, on_bad_rows
        self._resume_from: dict[str, int] | None = None
        self._num_taken, self._at_end = 0, False

    def __iter__(self) -> Iterator[PackedBatch]:
        """The batches that are left of the epoch.

        Raises:
            DataError: the stream is empty, or none of its rows can be used.
        """
        place = self._resume_from or {"epoch": self._epoch(), "num_batches": 0}
        self.dataset.epoch, self.dataset.skip = place["epoch"], place["num_batches"]
        self._num_taken, self._at_end = place["num_batches"], False
        batches, any_usable = place["num_batches"], place["num_batches"] > 0
        for batch, bad_rows in self._loader:
            if bad_rows:
                self._on_bad_rows(bad_rows)
            if batch is not None:
                batches += 1
                any_usable |= bool((batch.row_ids >= 0).any())
                yield batch
        if not batches or not self._usable_anywhere(any_usable):
            raise DataError(f"{', '.join(self.dataset.sources)}: no usable row")
        self._at_end = True

    def _usable_anywhere(self, here: bool) -> bool:
        """Whether any rank had a usable row; all get to the end after equally many batches."""
        if self.dataset.num_replicas == 1 or not torch.distributed.is_initialized():
            return here or self.dataset.num_replicas > 1
        found: list[Any] = [None] * self.dataset.num_replicas
        torch.distributed.all_gather_object(found, here)
        return any(found)

    def count_batch(self) -> None:
        """A batch is being trained on: a checkpoint from here on comes after it."""
        self._resume_from = None
        self._num_taken += 1

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches have been trained on."""
        if self._resume_from is not None:
            return self._resume_from
        if self._at_end:
            return {"epoch": self.dataset.epoch + 1, "num_batches": 0}
        return {"epoch": self.dataset.epoch, "num_batches": self._num_taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there: what came before is read again, and not tokenised."""
        self._resume_from = state


def _as_it_is(item: T) -> T:
    return item


class RejectedRows:
    """The bad rows of a stream, written down as they are met, each once."""

    def __init__(self, path: Path, *, keep: bool) -> None:
        """Begin a file.

        Args:
            path: of the file; its folder is made.
            keep: go on with the rows that it has: the run is resumed.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():  # somebody left it there: nothing is written through it
            path.unlink()
        self.path = path
        before = path.read_text("ascii").splitlines() if keep and path.exists() else []
        self._lines = dict.fromkeys(before)
        path.write_text("".join(line + "\n" for line in before), "ascii")

    def add(self, bad_rows: Iterable[BadRow]) -> None:
        """Append those that are not there yet."""
        fresh = [line for line in dict.fromkeys(map(as_line, bad_rows)) if line not in self._lines]
        self._lines.update(dict.fromkeys(fresh))
        with self.path.open("a", encoding="ascii") as file:
            file.writelines(line + "\n" for line in fresh)


class Streams:
    """The splits of a data module that are streamed."""

    def __init__(self) -> None:
        self.sources: dict[str, Sequence[str]] = {}
        self.resumed = False
        self._rejected: RejectedRows | None = None

    def __contains__(self, split: str) -> bool:
        return split in self.sources

    def open(self, split: str, sources: Sequence[str]) -> None:
        """Note a split, once it is seen that every source is there and can be read."""
        for source in sources:
            next(read_rows(source, BadRows(), streaming=True), None)
        self.sources[split] = sources

    def take_bad_rows(self, met: list[BadRow], folder: Path, rank: int, *, skip: bool) -> None:
        """Stop, or write them down and go on.

        Raises:
            DataError: names them, unless they are to be skipped.
        """
        found = BadRows()
        found.rows = met
        if not skip:
            found.raise_if_any()
        if self._rejected is None:
            name = f"rejected_rows-{rank}.jsonl" if rank else REJECTED_FILE
            self._rejected = RejectedRows(folder / name, keep=self.resumed)
            rank_zero_info(f"{found.report()}\nskipped, as further ones; written to {folder}")
        self._rejected.add(met)


def check_number_of_steps(trainer: lightning.Trainer | None) -> None:
    """A schedule has to know where it ends, and a stream does not.

    Raises:
        DataError: neither `max_steps` nor a number of batches an epoch is given.
    """
    if trainer is None or trainer.max_steps != -1:
        return
    if not isinstance(trainer.limit_train_batches, int) or trainer.max_epochs == -1:
        raise DataError(
            "how many rows a stream has is not known before its end, and the learning rate's "
            "schedule needs the number of steps: set trainer.max_steps"
        )


def count_batch(trainer: Any) -> None:
    """Tell a stream that is being trained on that one more of its batches was taken."""
    if trainer is not None and trainer.training:
        loader = trainer.train_dataloader
        if isinstance(loader, StreamingLoader):
            loader.count_batch()
