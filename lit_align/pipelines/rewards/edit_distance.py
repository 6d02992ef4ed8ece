"""Which tokens of a response a correction changes: Levenshtein over token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Alignment(NamedTuple):
    """How a response becomes its correction with the fewest edits.

    Attributes:
        edited: (N,) bool, the response's tokens that are substituted or deleted.
        distance: substitutions + deletions + insertions.
    """

    edited: np.ndarray
    distance: int


def align(response_ids: Sequence[int], correction_ids: Sequence[int]) -> Alignment:
    """The alignment with the fewest edits and, among those, the fewest edited response tokens.

    What ties are left are broken from the left: match before substitution before deletion before
    insertion. An insertion edits no token of the response, so it marks none. By hand: A B C → A X C
    edits B; A B → B C edits A (B is kept, C inserted: as many edits as two substitutions, but fewer
    tokens of the response); A C → A B C edits none.

    Time and memory O(n·m) without the common beginning and end.
    """
    a, b = np.asarray(response_ids, np.int64), np.asarray(correction_ids, np.int64)
    start = _common_prefix(a, b)
    end = _common_prefix(a[start:][::-1], b[start:][::-1])
    edited = np.zeros(len(a), bool)
    inner_a, inner_b = a[start : len(a) - end], b[start : len(b) - end]
    edited[start : len(a) - end], distance = _align_inner(inner_a, inner_b)
    return Alignment(edited, distance)


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    size = min(len(a), len(b))
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if len(different) else size


def _align_inner(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, int]:
    """`align` without the shortcut for what both have in common at the ends."""
    # One integer orders by edits first and edited response tokens second.
    unit = len(a) + 1
    change, insert = unit + 1, unit
    costs = _suffix_costs(a, b, change, insert)
    edited = np.zeros(len(a), bool)
    i = j = 0
    while i < len(a):
        here = costs[i, j]
        if j < len(b) and a[i] == b[j]:  # matching equal tokens is never worse
            i, j = i + 1, j + 1
        elif j < len(b) and here == costs[i + 1, j + 1] + change:
            edited[i] = True
            i, j = i + 1, j + 1
        elif here == costs[i + 1, j] + change:
            edited[i] = True
            i += 1
        else:
            j += 1
    return edited, int(costs[0, 0] // unit)


def _suffix_costs(a: np.ndarray, b: np.ndarray, change: int, insert: int) -> np.ndarray:
    """(n+1, m+1) int64: the cost of turning a[i:] into b[j:]."""
    inserted = insert * np.arange(len(b) + 1)
    costs = np.empty((len(a) + 1, len(b) + 1), np.int64)
    costs[-1] = inserted[::-1]
    for i in range(len(a) - 1, -1, -1):
        row = costs[i + 1] + change  # delete a[i]
        row[:-1] = np.minimum(row[:-1], costs[i + 1, 1:] + np.where(b == a[i], 0, change))
        # Then insertions: row[j] = min over k >= j of row[k] + insert·(k − j).
        costs[i] = np.minimum.accumulate((row + inserted)[::-1])[::-1] - inserted
    return costs
