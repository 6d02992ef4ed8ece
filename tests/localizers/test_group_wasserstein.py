"""The fast Wasserstein-1 of heads that share entries, against the definition in long doubles."""

import numpy as np
import pytest
import torch

from lit_align.localizers import head_distance_scores
from lit_align.localizers.group_wasserstein import LIMIT, group_wasserstein
from tests.attention_models import save_pair


def pair(size: int, seed: int, change: float, scale: float = 0.05, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    base = scale * torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
    moved = change * torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
    return base, base + moved


def exact(parts, tau: float = 1.0) -> float:
    """Σ |CDF − CDF| of the two softmaxes, in 80 bits."""
    base, task = (
        torch.cat([p[i] for p in parts]).double().numpy().astype(np.longdouble) for i in (0, 1)
    )
    p, q = (np.exp(x / tau - (x / tau).max()) for x in (base, task))
    return float(np.abs(np.cumsum(p / p.sum() - q / q.sum()))[:-1].sum())


@pytest.mark.parametrize("change", [1e-7, 1e-5, 1e-2, 1.0])
@pytest.mark.parametrize("size", [507, 36864])
def test_small_changes_are_as_precise_as_large_ones(size, change):
    shared = [pair(size, 10, change), pair(size + 3, 11, change)]
    queries = [pair(2 * size, seed, change) for seed in range(3)]
    found = group_wasserstein(queries, shared, 1.0)
    expected = [exact([query, *shared]) for query in queries]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("tau", [0.1, 3.0])
def test_tau(tau):
    shared, query = [pair(300, 1, 0.1), pair(300, 2, 0.1)], pair(300, 3, 0.1)
    found = group_wasserstein([query], shared, tau)
    np.testing.assert_allclose(found, [exact([query, *shared], tau)], rtol=2e-6)


def test_double_precision_is_kept():
    shared = [pair(300, i, 1e-9, dtype=torch.float64) for i in (1, 2)]
    query = pair(300, 3, 1e-9, dtype=torch.float64)
    found = group_wasserstein([query], shared, 1.0)
    np.testing.assert_allclose(found, [exact([query, *shared])], rtol=1e-8)


def test_equal_models_are_exactly_zero_apart():
    shared, query = [pair(300, 1, 0.0)], pair(300, 2, 0.0)
    assert group_wasserstein([query], shared, 1.0) == [0.0]


@pytest.mark.parametrize("value", [1.01 * LIMIT, -1.01 * LIMIT, float("nan"), float("inf")])
def test_entries_that_are_too_large_are_left_to_the_general_way(value):
    shared, query = [pair(300, 1, 0.1)], pair(300, 2, 0.1)
    for part in (query, *shared):
        for side in (0, 1):
            kept = part[side][7].clone()
            part[side][7] = value
            of_base = side == 0
            found = group_wasserstein([query], shared, 1.0)
            part[side][7] = kept
            if of_base or not np.isfinite(value):
                assert found is None
    query[1][7] = 200.0  # exp(200) is no fp32
    assert group_wasserstein([query], shared, 1.0) is None


@pytest.mark.parametrize("metric", ["wasserstein", "wasserstein_normalized"])
def test_large_weights_are_scored_all_the_same(metric, tmp_path):
    """As with a τ that makes them small: the softmax of 100 x / 100."""
    base, task, *models = save_pair(tmp_path, "gqa", change=0.05)
    small = head_distance_scores(base, task, "qkv", metric)
    for model, folder in zip(models, (base, task), strict=True):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(100)
        model.save_pretrained(folder)
    as_before = head_distance_scores(base, task, "qkv", metric, tau=100.0)
    for block, scores in small.items():
        torch.testing.assert_close(as_before[block], scores, rtol=1e-5, atol=0)
    large = head_distance_scores(base, task, "qkv", metric)["0"]
    for head, score in enumerate(large):
        rows = [slice(8 * i, 8 * i + 8) for i in (head, head // 2, head // 2)]
        parts = []
        for letter, at in zip("qkv", rows, strict=True):
            weights = [getattr(m.model.layers[0].self_attn, f"{letter}_proj").weight[at].flatten()
                       for m in models]  # fmt: skip
            parts.append(tuple(w.detach() for w in weights))
        expected = exact(parts) / (767 if metric.endswith("normalized") else 1)
        assert float(score) == pytest.approx(expected, rel=1e-6)
