"""How far two distributions over the entries of an attention head are apart.

Every function takes `base` and `task`, (..., N) fp64, each a distribution over its last dimension
(the softmax of a head's entries, in row-major order), and gives (...,) fp64. Larger is further
apart; equal distributions are 0 apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

EPSILON = 1e-8  # of the divergences: ALPS's public code adds it to every probability
Metric = Literal[
    "wasserstein",
    "wasserstein_normalized",
    "kl_divergence",
    "js_divergence",
    "cosine_distance",
    "euclidean_distance",
]


def wasserstein(base: Tensor, task: Tensor) -> Tensor:
    """Wasserstein-1 with an entry's index as its place: Σ_i |CDF_base(i) − CDF_task(i)|.

    On a line it is the area between the two cumulative sums (Vallender, 1974): one pass, no sort.
    """
    # The last difference of the sums is that of two totals of 1, and no area lies behind it.
    return (base - task).cumsum_(-1)[..., :-1].abs_().sum(-1)


def wasserstein_normalized(base: Tensor, task: Tensor) -> Tensor:
    """Wasserstein-1 with the entries spread evenly over [0, 1]: `wasserstein` / (N − 1)."""
    return wasserstein(base, task) / max(base.shape[-1] - 1, 1)


def kl_divergence(base: Tensor, task: Tensor, epsilon: float = EPSILON) -> Tensor:
    """KL(task ‖ base) in nats, of the distributions with `epsilon` added to every entry."""
    p, q = _smoothed(base, epsilon), _smoothed(task, epsilon)
    return (q * (q / p).log()).sum(-1)


def js_divergence(base: Tensor, task: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Jensen-Shannon divergence in nats (not its root), with `epsilon` added to every entry."""
    p, q = _smoothed(base, epsilon), _smoothed(task, epsilon)
    middle = (p + q) / 2
    return ((p * (p / middle).log()).sum(-1) + (q * (q / middle).log()).sum(-1)) / 2


def cosine_distance(base: Tensor, task: Tensor) -> Tensor:
    """1 − cos(base, task), as half the squared distance of the unit vectors.

    So a small angle keeps its digits, which a difference of two numbers near 1 would lose.
    """
    p, q = (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (base, task))
    return (p - q).square().sum(-1) / 2


def euclidean_distance(base: Tensor, task: Tensor) -> Tensor:
    """‖base − task‖₂."""
    return torch.linalg.vector_norm(base - task, dim=-1)


METRICS: Mapping[Metric, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {
        "wasserstein": wasserstein,
        "wasserstein_normalized": wasserstein_normalized,
        "kl_divergence": kl_divergence,
        "js_divergence": js_divergence,
        "cosine_distance": cosine_distance,
        "euclidean_distance": euclidean_distance,
    }
)


def _smoothed(distribution: Tensor, epsilon: float) -> Tensor:
    raised = distribution + epsilon
    return raised / raised.sum(-1, keepdim=True)
