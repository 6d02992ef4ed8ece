"""Which rows make up which batch: shuffled, grouped by length, the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import DistributedSampler

WINDOW_BATCHES = 50


class BatchSampler(DistributedSampler):
    """Yields lists of row indices, one a step, for `DataLoader(sampler=, batch_size=None)`.

    Global batches of `batch_size * num_replicas` rows are formed first and then dealt out, rank r
    taking every num_replicas-th row: so each epoch visits every row exactly once, and W ranks with
    batch size B see the same global batches as one rank with batch size W·B. The last global batch
    may be smaller. A rank for which it holds no row gets one FILLER instead, written as `~index`
    (negative): a copy of a row that only keeps the ranks in step and must not count anywhere.

    Being a `DistributedSampler` it is left alone by Lightning, which calls `set_epoch` on it.

    Args:
        lengths: tokens of each row.
        batch_size: rows per step and rank.
        shuffle: a new order each epoch, from (seed, epoch) alone.
        group_by_length: sort by length inside windows of 50 global batches and shuffle the batches
            (without `shuffle`: sort everything, longest first, so that memory runs out at once).
        num_replicas: data-parallel ranks.
        rank: this one.
        seed: of the shuffle.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        shuffle: bool,
        group_by_length: bool = True,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        # The base class's own __init__ is about a dataset and a sample count; none of it fits.
        self.lengths = np.asarray(lengths, np.int64)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.group_by_length = group_by_length
        self.num_replicas = num_replicas
        self.rank = rank
        self.seed = seed
        self.epoch = 0
        self._skip = 0

    def __len__(self) -> int:
        """Steps per epoch, the same on every rank."""
        return -(-len(self.lengths) // (self.batch_size * self.num_replicas))

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        skip, self._skip = self._skip, 0
        yield from self.batches()[skip:]

    def skip_batches(self, count: int) -> None:
        """Leave the first batches out of the next epoch: a resumed run has seen them."""
        self._skip = count

    def batches(self) -> list[list[int]]:
        """This epoch's batches of this rank."""
        return [
            global_batch[self.rank :: self.num_replicas].tolist() or [~int(global_batch[0])]
            for global_batch in self.global_batches()
        ]

    def global_batches(self) -> list[np.ndarray]:
        """This epoch's batches of row indices, over all ranks."""
        rng = np.random.default_rng([self.seed, self.epoch])
        size = self.batch_size * self.num_replicas
        count = len(self.lengths)
        order = rng.permutation(count) if self.shuffle else np.arange(count)
        if self.group_by_length:
            window = size * WINDOW_BATCHES if self.shuffle else max(count, 1)
            order = np.concatenate(
                [self._sorted(order[i : i + window]) for i in range(0, count, window)] or [order]
            )
        batches = [order[i : i + size] for i in range(0, count, size)]
        if self.shuffle and self.group_by_length:
            return [batches[i] for i in rng.permutation(len(batches))]
        return batches

    def _sorted(self, indices: np.ndarray) -> np.ndarray:
        """Longest first; equal lengths keep their order."""
        return indices[np.argsort(-self.lengths[indices], kind="stable")]
