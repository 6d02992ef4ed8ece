"""Which rows make up which batch, where a batch is so many tokens and not so many rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from lit_align.data.sampler import WINDOW_BATCHES, BatchSampler

DRAWS = 8  # orders that an epoch tries before it packs the tightest way


class TokenBudgetSampler(BatchSampler):
    """Yields lists of row indices of at most `max_tokens` tokens together.

    Rows are packed first-fit, longest first, in windows of about 50 global batches of the epoch's
    order (in that order and next-fit without `group_by_length`). Packs of like size then make up a
    step, whose rows are spread over the ranks so that all have about equally many tokens.

    Every epoch visits every row exactly once, in equally many steps: as many as the first epoch
    takes, and no fewer than the tightest packing. An epoch whose order needs more draws another;
    one that needs fewer divides a batch. Fillers are as in `BatchSampler`.

    Args:
        lengths: tokens of each row, none above max_tokens.
        max_tokens: of a step and rank.
        shuffle: a new order each epoch, from (seed, epoch) alone; without it the longest row comes
            first, or with `group_by_length=False` rows stay in order.
        group_by_length: see above.
        num_replicas: data-parallel ranks.
        rank: this one.
        seed: of the shuffle.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        max_tokens: int,
        *,
        shuffle: bool,
        group_by_length: bool = True,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            lengths,
            batch_size=1,
            shuffle=shuffle,
            group_by_length=group_by_length,
            num_replicas=num_replicas,
            rank=rank,
            seed=seed,
        )
        if len(self.lengths) and self.lengths.max() > max_tokens:
            raise ValueError(f"a row of {self.lengths.max()} tokens, max_tokens {max_tokens}")
        self.max_tokens = max_tokens
        first = self._packed(self._order(np.random.default_rng([seed, 0])))
        bins = max(len(first), len(self._tightest(np.arange(len(self.lengths)))))
        self._num_steps = -(-bins // num_replicas)

    def __len__(self) -> int:
        """Steps per epoch, the same on every rank and in every epoch."""
        return self._num_steps

    def batches(self) -> list[list[int]]:
        """This epoch's batches of this rank."""
        found = []
        for step in self.steps():
            mine = step[self.rank]
            shortest = min((row for rows in step for row in rows), key=lambda i: self.lengths[i])
            found.append(mine or [~shortest])
        return found

    def steps(self) -> list[list[list[int]]]:
        """This epoch's row indices: step → rank → rows."""
        rng = np.random.default_rng([self.seed, self.epoch])
        bins = self._fitting(rng)
        while len(bins) < self._num_steps:
            most = max(bins, key=len)
            bins.remove(most)
            bins += [most[0::2], most[1::2]]
        if self.group_by_length:
            bins.sort(key=self._tokens, reverse=True)
        bounds = np.linspace(0, len(bins), self._num_steps + 1).astype(int)
        steps = [self._shared(bins[a:b]) for a, b in pairwise(bounds)]
        return [steps[i] for i in rng.permutation(len(steps))] if self.shuffle else steps

    def _fitting(self, rng: np.random.Generator) -> list[list[int]]:
        """Rows of each bin, no more bins than there are places."""
        for _ in range(DRAWS):
            order = self._order(rng)
            bins = self._packed(order)
            if len(bins) <= self._num_steps * self.num_replicas:
                return bins
        return self._tightest(order)

    def _order(self, rng: np.random.Generator) -> np.ndarray:
        count = len(self.lengths)
        return rng.permutation(count) if self.shuffle else np.arange(count)

    def _packed(self, order: np.ndarray) -> list[list[int]]:
        if not self.group_by_length:
            return self._in_order(order)
        window = max(len(order), 1)
        if self.shuffle and len(order):
            rows_a_bin = max(1, int(self.max_tokens / self.lengths.mean()))
            window = WINDOW_BATCHES * self.num_replicas * rows_a_bin
        windows = [order[i : i + window] for i in range(0, len(order), window)]
        return [rows for part in windows for rows in self._tightest(part)]

    def _tightest(self, order: np.ndarray) -> list[list[int]]:
        """First-fit, longest first."""
        order = self._sorted(order)
        free = np.full(len(order), self.max_tokens)
        bins: list[list[int]] = []
        for row in order.tolist():
            length = self.lengths[row]
            place = int(np.argmax(free[: len(bins) + 1] >= length))  # the last of these is unused
            if place == len(bins):
                bins.append([])
            bins[place].append(row)
            free[place] -= length
        return bins

    def _in_order(self, order: np.ndarray) -> list[list[int]]:
        """Next-fit."""
        bins: list[list[int]] = []
        free = 0
        for row in order.tolist():
            if not bins or self.lengths[row] > free:
                bins.append([])
                free = self.max_tokens
            bins[-1].append(row)
            free -= self.lengths[row]
        return bins

    def _shared(self, bins: list[list[int]]) -> list[list[int]]:
        """A step's rows by rank: longest first, each to the rank with the fewest tokens so far."""
        if self.num_replicas == 1:
            return bins
        shares: list[list[int]] = [[] for _ in range(self.num_replicas)]
        tokens = [0] * self.num_replicas
        for row in self._sorted(np.array([row for rows in bins for row in rows])).tolist():
            least = tokens.index(min(tokens))
            shares[least].append(row)
            tokens[least] += int(self.lengths[row])
        if max(tokens) <= self.max_tokens:
            return shares
        return bins + [[] for _ in range(self.num_replicas - len(bins))]

    def _tokens(self, rows: list[int]) -> int:
        return int(self.lengths[rows].sum())
