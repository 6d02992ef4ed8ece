"""Distances of distributions: numbers by hand, and scipy's where it is installed."""

import math

import numpy as np
import pytest
import torch

from lit_align.localizers.distances import (
    METRICS,
    cosine_distance,
    euclidean_distance,
    js_divergence,
    kl_divergence,
    wasserstein,
    wasserstein_normalized,
)

BASE = torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.float64)
TASK = torch.tensor([0.25, 0.25, 0.0, 0.5], dtype=torch.float64)


def distributions(size: int, seed: int = 0, change: float = 1.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    entries = torch.randn(size, generator=generator, dtype=torch.float64)
    moved = entries + change * torch.randn(size, generator=generator, dtype=torch.float64)
    return entries.softmax(0), moved.softmax(0)


def test_numbers_by_hand():
    # CDFs .5 .75 1 1 and .25 .5 .5 1: areas .25 + .25 + .5 = 1; over [0, 1] a third of it.
    assert wasserstein(BASE, TASK).item() == pytest.approx(1.0)
    assert wasserstein_normalized(BASE, TASK).item() == pytest.approx(1 / 3)
    assert euclidean_distance(BASE, TASK).item() == pytest.approx(math.sqrt(0.375))
    assert cosine_distance(BASE, TASK).item() == pytest.approx(1 - 0.1875 / 0.375)
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    quarter = torch.tensor([0.25, 0.75], dtype=torch.float64)
    of_task = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert kl_divergence(half, quarter).item() == pytest.approx(of_task, rel=1e-6)
    middle = (0.375, 0.625)
    js = sum(0.5 * math.log(0.5 / m) for m in middle) + sum(
        p * math.log(p / m) for p, m in zip((0.25, 0.75), middle, strict=True)
    )
    assert js_divergence(half, quarter).item() == pytest.approx(js / 2, rel=1e-6)


def test_epsilon_is_added_to_every_entry_before_the_divergence():
    """So that an entry of no probability at all counts for something finite."""
    p, q = (np.array(x.tolist()) + 1e-8 for x in (BASE, TASK))
    p, q = p / p.sum(), q / q.sum()
    assert kl_divergence(BASE, TASK).item() == pytest.approx(np.sum(q * np.log(q / p)), rel=1e-12)
    assert kl_divergence(BASE, TASK).item() > 8  # 0.5 · ln(0.5 / 1e-8) is 8.9


def test_kl_is_of_the_task_model_against_the_base():
    p, q = distributions(50)
    assert kl_divergence(p, q).item() != pytest.approx(kl_divergence(q, p).item(), rel=1e-2)
    assert js_divergence(p, q).item() == pytest.approx(js_divergence(q, p).item(), rel=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_a_batch_is_its_members(metric):
    pairs = [distributions(123, seed) for seed in range(3)]
    base, task = (torch.stack(each) for each in zip(*pairs, strict=True))
    one_by_one = torch.stack([METRICS[metric](p, q) for p, q in pairs])
    torch.testing.assert_close(METRICS[metric](base, task), one_by_one, rtol=1e-12, atol=0)
    assert METRICS[metric](base, base).abs().max() == 0


@pytest.mark.parametrize("metric", METRICS)
def test_small_changes_keep_their_digits(metric):
    """Every metric but the Wasserstein ones is quadratic or linear in a change that is small."""
    order = 1 if metric in ("wasserstein", "wasserstein_normalized", "euclidean_distance") else 2
    values = [METRICS[metric](*distributions(20_000, change=c)).item() for c in (1e-5, 2e-5)]
    assert values[1] / values[0] == pytest.approx(2**order, rel=1e-3)


@pytest.mark.parametrize("size", [2, 252, 507])
def test_scipys_numbers(size):
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    distance = pytest.importorskip("scipy.spatial.distance")
    p, q = distributions(size)
    index, unit = np.arange(size), np.linspace(0, 1, size)
    p8, q8 = (x.numpy() + 1e-8 for x in (p, q))
    expected = {
        "wasserstein": stats.wasserstein_distance(index, index, p, q),
        "wasserstein_normalized": stats.wasserstein_distance(unit, unit, p, q),
        "kl_divergence": stats.entropy(q8, p8),
        "js_divergence": distance.jensenshannon(p8, q8) ** 2,
        "cosine_distance": distance.cosine(p, q),
        "euclidean_distance": distance.euclidean(p, q),
    }
    for metric, value in expected.items():
        assert METRICS[metric](p, q).item() == pytest.approx(value, rel=1e-9), metric
