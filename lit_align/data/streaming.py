"""Rows that are read, shuffled and tokenised as they come, for data larger than memory.

Every process reads the whole stream and takes its own share: of each global batch every
num_replicas-th row, and of this rank's batches every num_workers-th. So nothing has to be agreed
upon: no row is lost or seen twice, all ranks have equally many batches, and neither the number of
ranks nor of workers changes what a global batch holds. Parsing is repeated by each process,
tokenising, which costs far more, is not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from lit_align.batch import CHOSEN, REJECTED, PackedBatch
from lit_align.data.bad_rows import BadRow, BadRowError, BadRows
from lit_align.data.files import read_rows
from lit_align.data.loading import RowLoader
from lit_align.data.packing import FILLER_ROW_ID
from lit_align.data.schema import PreferenceRow, TokenizedRow, TokenizedSequence
from lit_align.data.shared_prefix import Layout, collator

T = TypeVar("T")


class RawRow(NamedTuple):
    """A row as it was read.

    Attributes:
        row_id: its place in the stream, before shuffling.
        source: the file, folder or hub id as the user named it.
        number: of the row or line there, counted from 1.
        columns: its values.
    """

    row_id: int
    source: str
    number: int
    columns: dict[str, Any]


class StreamedBatch(NamedTuple):
    """What a worker hands over.

    Attributes:
        batch: None where only bad rows are left to tell of.
        bad_rows: those that were met on the way.
    """

    batch: PackedBatch | None
    bad_rows: list[BadRow]


@dataclasses.dataclass(eq=False)
class StreamedRows(IterableDataset[StreamedBatch]):
    """One rank's batches of a stream.

    A row that cannot be used leaves its batch one row smaller; a batch without a usable row is one
    filler row, which keeps the ranks in step and counts nowhere.

    Attributes:
        loader: how rows are parsed, checked and tokenised; its `max_rows` counts rows, usable or
            not.
        sources: as `read_rows` takes them.
        batch_size: rows a step and rank.
        pad_id: fills up batches.
        shuffle_buffer: rows that are held to draw from; 0 keeps the order.
        seed: of the draws, with the epoch.
        num_replicas: data-parallel ranks.
        rank: this one.
        epoch: changes the order.
        skip: global batches to leave out at the beginning, which are read but not tokenised.
        layout: of the batches.
    """

    loader: RowLoader
    sources: Sequence[str]
    batch_size: int
    pad_id: int
    shuffle_buffer: int = 0
    seed: int = 0
    num_replicas: int = 1
    rank: int = 0
    epoch: int = 0
    skip: int = 0
    layout: Layout = "padded"

    def __iter__(self) -> Iterator[StreamedBatch]:
        worker = get_worker_info()
        index, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        unreadable = BadRows()
        told = 0
        for number, rows in enumerate(self._global_batches(unreadable)):
            if number < self.skip or (number - self.skip) % workers != index:
                continue
            batch, bad_rows = self._batch(rows[self.rank :: self.num_replicas])
            if self.rank == index == 0:  # every process meets them, one of them tells
                bad_rows += unreadable.rows[told:]
                told = len(unreadable)
            yield StreamedBatch(batch, bad_rows)
        if self.rank == index == 0 and told < len(unreadable):
            yield StreamedBatch(None, unreadable.rows[told:])

    def raw_rows(self, unreadable: BadRows) -> Iterator[RawRow]:
        """The stream in the order of its sources."""
        found = (
            (source, number, columns)
            for source in self.sources
            for number, columns in read_rows(source, unreadable, streaming=True)
        )
        for row_id, row in enumerate(islice(found, self.loader.max_rows)):
            yield RawRow(row_id, *row)

    def _global_batches(self, unreadable: BadRows) -> Iterator[list[RawRow]]:
        rows: Iterator[RawRow] = self.raw_rows(unreadable)
        if self.shuffle_buffer:
            generator = np.random.default_rng([self.seed, self.epoch])
            rows = shuffled(rows, self.shuffle_buffer, generator)
        while batch := list(islice(rows, self.batch_size * self.num_replicas)):
            yield batch

    def _batch(self, rows: Sequence[RawRow]) -> tuple[PackedBatch, list[BadRow]]:
        """This rank's part of a global batch."""
        usable: list[TokenizedRow] = []
        bad_rows = BadRows()
        for row in rows:
            try:
                usable.append(self.loader.tokenized(row.columns, row.row_id))
            except BadRowError as error:
                bad_rows.add(row.source, row.number, error, row.columns)
        make = collator(self.layout, self.pad_id)
        return make(usable or [self._filler()]), bad_rows.rows

    def _filler(self) -> TokenizedRow:
        """A row of no meaning, with as many sequences as the others have."""
        roles = (CHOSEN, REJECTED) if self.loader.row_type is PreferenceRow else (CHOSEN,)
        ids = np.array([self.loader.tokenize.encoder.eos_id])
        sequences = (TokenizedSequence(ids, ids, None, role) for role in roles)
        return TokenizedRow(FILLER_ROW_ID, tuple(sequences))


def shuffled(items: Iterable[T], size: int, generator: np.random.Generator) -> Iterator[T]:
    """Items in random order, by a buffer of `size` of them: one is drawn, the next takes its place.

    An item comes out at most `size` − 1 places early, and at any later place.
    """
    buffer: list[T] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        place = int(generator.integers(size))
        yield buffer[place]
        buffer[place] = item
    for place in generator.permutation(len(buffer)):
        yield buffer[place]
