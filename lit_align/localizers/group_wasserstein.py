"""Wasserstein-1 between the heads of two models, from the change of their entries.

The same number as `distances.wasserstein` of the two softmaxes, several times as fast: what the
heads of a group share (their keys and values) is exponentiated and summed up once, and the rest is
fp32. That is precise because no two large numbers are subtracted. With entries x of the base, x + δ
of the task model, u = exp(x) and g = expm1(δ), and with Z = Σ u, Z′ = Σ u (1 + g):

    q_i − p_i = u_i (1 + g_i) / Z′ − u_i / Z = u_i (g_i − ρ) / Z′,    ρ = (Z′ − Z) / Z

so that every term has the relative precision of fp32, however small the change. Sums are fp64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

LIMIT = 16.0  # of |x|: u is far inside fp32, and x keeps 20 bits after the point
Pair = tuple[Tensor, Tensor]  # of base and task


def group_wasserstein(
    queries: Iterable[Pair], shared: Sequence[Pair], tau: float
) -> list[float] | None:
    """Σ_i |CDF_base(i) − CDF_task(i)| for each head of a group.

    Args:
        queries: the entries of each head alone, flat, which come first in a distribution.
        shared: the entries that all of them have, flat, which come last, part by part.
        tau: temperature of the softmax.

    Returns:
        The distances; None where entries are too large for fp32, or not finite.
    """
    parts = [_Part.of(pair, tau) for pair in shared]
    if any(part is None for part in parts):
        return None
    running = [(_running(part.weights), _running(part.changes)) for part in parts if part]
    distances = []
    for pair in queries:
        head = _Part.of(pair, tau)
        if head is None:
            return None
        distances.append(_area(head, running))
    return distances if all(map(math.isfinite, distances)) else None


def _area(head: _Part, running: Sequence[Pair]) -> float:
    """Of one head, with the running sums of what it shares."""
    total = float(_sum(head.weights)) + sum(float(weights[-1]) for weights, _ in running)
    moved = float(_sum(head.changes)) + sum(float(changes[-1]) for _, changes in running)
    rho = moved / total
    differences = _running(head.changes.sub_(head.weights, alpha=rho))
    carried = differences[-1].clone()
    area = differences.abs_().sum()
    for weights, changes in running:
        differences = torch.sub(changes, weights, alpha=rho).add_(carried)
        carried = differences[-1].clone()
        area += differences.abs_().sum()
    # No area lies behind the last entry: what is left there of Σ q − Σ p = 0 is rounding.
    return float(area - carried.abs()) / (total + moved)


@dataclasses.dataclass
class _Part:
    """Some entries of a distribution: u of the base, and the change u g."""

    weights: Tensor
    changes: Tensor

    @classmethod
    def of(cls, pair: Pair, tau: float) -> _Part | None:
        base, task = pair
        changes = torch.sub(task, base)
        if tau != 1.0:
            base, changes = base / tau, changes.div_(tau)
        low, high = base.aminmax()
        if not (float(low) >= -LIMIT and float(high) <= LIMIT):  # NaN is neither
            return None
        weights = base.exp()
        return cls(weights, changes.expm1_().mul_(weights))


def _running(values: Tensor) -> Tensor:
    return values.cumsum(0, dtype=torch.float64)


def _sum(values: Tensor) -> Tensor:
    return values.sum(dtype=torch.float64)
