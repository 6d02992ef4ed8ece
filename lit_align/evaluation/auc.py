"""Area under the ROC curve, ties counted half, and its interval over rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lit_align.errors import DataError


class Estimate(NamedTuple):
    """A value with the ends of its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """The probability that a positive has a higher score than a negative, ties counted half.

    The rank statistic U / (P·N) (Mann and Whitney 1947). By hand: labels 1 0 1 0 and scores
    4 3 2 2: of the four pairs 4 > 3, 4 > 2, 2 < 3 and 2 = 2: (1 + 1 + 0 + 1/2) / 4 = 0.625.

    Args:
        labels: (N,) bool, true for positives.
        scores: (N,), finite.

    Raises:
        DataError: no positive or no negative, or a score that is not finite.
    """
    labels, scores = np.asarray(labels, bool), np.asarray(scores, np.float64)
    if labels.shape != scores.shape or not np.isfinite(scores).all():
        raise DataError("auc needs a finite score for every label")
    if labels.all() or not labels.any():
        raise DataError("auc needs positives and negatives")
    _, levels = np.unique(scores, return_inverse=True)
    return _auc(labels, levels, np.ones(len(labels)))


def _auc(labels: np.ndarray, levels: np.ndarray, weights: np.ndarray) -> float:
    """`auc` of entries that count `weights` times; `levels` are the ranks of distinct scores."""
    size = int(levels.max()) + 1
    positives = np.bincount(levels, weights * labels, size)
    negatives = np.bincount(levels, weights * ~labels, size)
    below = np.cumsum(negatives) - negatives
    pairs = positives.sum() * negatives.sum()
    return float(positives @ (below + negatives / 2) / pairs)


def pooled_auc(
    labels: Sequence[np.ndarray],
    scores: Sequence[np.ndarray],
    *,
    samples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """AUC over the entries of all rows; the interval is of rows drawn anew.

    Args:
        labels: (N_i,) bool of each row.
        scores: (N_i,) of each row.
        samples: bootstrap samples; one without positives or without negatives is left out.
        seed: of the draws.
    """
    flat, values = np.concatenate(labels), np.concatenate(scores)
    found = auc(flat, values)
    _, levels = np.unique(values, return_inverse=True)
    row_of = np.repeat(np.arange(len(labels)), [len(row) for row in labels])
    drawn = []
    for counts in _row_counts(len(labels), samples, seed):
        weights = counts[row_of]
        if (weights * flat).any() and (weights * ~flat).any():
            drawn.append(_auc(flat, levels, weights))
    return Estimate(found, *_interval(drawn or [found]))


def mean_auc(
    labels: Sequence[np.ndarray],
    scores: Sequence[np.ndarray],
    *,
    samples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Mean of the rows' own AUCs; arguments as in `pooled_auc`, each row with both labels."""
    by_row = np.array([auc(*pair) for pair in zip(labels, scores, strict=True)])
    drawn = [counts @ by_row / len(by_row) for counts in _row_counts(len(by_row), samples, seed)]
    return Estimate(float(by_row.mean()), *_interval(drawn))


def _row_counts(rows: int, samples: int, seed: int) -> np.ndarray:
    """(samples, rows): how often each row is in a bootstrap sample."""
    return np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=samples)


def _interval(drawn: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)
