import itertools

import numpy as np
import pytest

from lit_align.data.token_budget import TokenBudgetSampler

LENGTHS = np.random.default_rng(0).lognormal(5, 0.6, 600).astype(int).clip(10, 900)
CASES = list(itertools.product([1, 3], [True, False], [True, False]))


def samplers(lengths, max_tokens, ranks=1, **settings):
    settings = {"shuffle": True, "seed": 1} | settings
    return [
        TokenBudgetSampler(lengths, max_tokens, num_replicas=ranks, rank=rank, **settings)
        for rank in range(ranks)
    ]


@pytest.mark.parametrize(("ranks", "shuffle", "group_by_length"), CASES)
def test_every_row_once_within_the_budget_in_equally_many_steps(ranks, shuffle, group_by_length):
    found = samplers(LENGTHS, 2048, ranks, shuffle=shuffle, group_by_length=group_by_length)
    for epoch in range(3):
        for sampler in found:
            sampler.set_epoch(epoch)
        steps = list(zip(*found, strict=True))  # strict: no rank has fewer
        assert len(steps) == len(found[0])
        rows = [i for step in steps for batch in step for i in batch]
        assert sorted(i for i in rows if i >= 0) == list(range(len(LENGTHS)))
        tokens = np.array([[LENGTHS[batch].sum() for batch in step] for step in steps])
        assert tokens.max() <= 2048
        assert (tokens.max(1) - tokens.min(1)).mean() < 0.04 * tokens.mean()  # equal work
    assert LENGTHS.sum() / (len(steps) * ranks * 2048) > (0.93 if group_by_length else 0.85)


def test_packs_by_hand():
    (sampler,) = samplers([5, 4, 3, 7, 2], 9, shuffle=False)
    assert list(sampler) == [[3, 4], [0, 1], [2]]  # 7 + 2, 5 + 4, 3
    (in_order,) = samplers([5, 4, 3, 7, 2], 9, shuffle=False, group_by_length=False)
    assert list(in_order) == [[0, 1], [2], [3, 4]]


def test_a_step_is_spread_over_the_ranks_by_tokens():
    ranks = samplers([5, 4, 3, 2], 9, 2, shuffle=False)
    assert [list(rank) for rank in ranks] == [[[0, 3]], [[1, 2]]]  # 7 and 7


def test_a_rank_without_a_row_gets_a_filler():
    ranks = samplers([9, 3], 9, 3, shuffle=False)
    assert [list(rank) for rank in ranks] == [[[0]], [[1]], [[~1]]]


def test_epochs_differ_and_repeat_and_resume():
    (sampler,) = samplers(LENGTHS, 2048)
    first = list(sampler)
    assert first == list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    sampler.skip_batches(7)
    assert list(sampler) == second[7:]
    assert list(sampler) == second


def test_no_rows_no_batches_and_too_long_rows():
    (sampler,) = samplers([], 8)
    assert len(sampler) == 0 and list(sampler) == []
    with pytest.raises(ValueError, match="a row of 9 tokens"):
        samplers([3, 9], 8)
