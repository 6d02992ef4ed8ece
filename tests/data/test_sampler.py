import numpy as np
import pytest

from lit_align.data.sampler import WINDOW_BATCHES, BatchSampler

LENGTHS = np.random.default_rng(0).integers(5, 500, 1037).tolist()


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("group_by_length", [True, False])
def test_every_row_exactly_once_on_one_process(shuffle, group_by_length):
    sampler = BatchSampler(LENGTHS, 4, shuffle=shuffle, group_by_length=group_by_length)
    batches = list(sampler)
    assert sorted(i for batch in batches for i in batch) == list(range(len(LENGTHS)))
    assert len(batches) == len(sampler) == 260
    assert sorted(map(len, batches)) == [1] + [4] * 259


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_split_the_global_batches_of_one_process(world_size):
    settings = {"shuffle": True, "seed": 3}
    alone = [set(batch) for batch in BatchSampler(LENGTHS, 4 * world_size, **settings)]
    ranks = [
        list(BatchSampler(LENGTHS, 4, num_replicas=world_size, rank=r, **settings))
        for r in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    together = [{i for batch in step for i in batch if i >= 0} for step in zip(*ranks, strict=True)]
    assert together == alone


def test_a_rank_without_a_row_gets_one_filler():
    ranks = [
        list(BatchSampler([9] * 9, 2, shuffle=False, num_replicas=4, rank=r)) for r in range(4)
    ]
    assert [batches[-1] for batches in ranks] == [[8], [~8], [~8], [~8]]


def test_epochs_differ_and_repeat():
    sampler = BatchSampler(LENGTHS, 4, shuffle=True, seed=1)
    first = list(sampler)
    assert first == list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert first != list(BatchSampler(LENGTHS, 4, shuffle=True, seed=2))


def test_grouping_saves_padding_and_stays_random():
    def padding(sampler):
        lengths = np.asarray(LENGTHS)
        return sum(int((lengths[b].max() - lengths[b]).sum()) for b in sampler)

    grouped = BatchSampler(LENGTHS, 4, shuffle=True)
    plain = BatchSampler(LENGTHS, 4, shuffle=True, group_by_length=False)
    assert padding(grouped) < 0.1 * padding(plain)
    longest = [max(LENGTHS[i] for i in batch) for batch in grouped]
    assert longest[:WINDOW_BATCHES] != sorted(longest[:WINDOW_BATCHES], reverse=True)


def test_evaluation_takes_the_longest_first_or_the_file_order():
    grouped = BatchSampler([3, 9, 5], 1, shuffle=False)
    assert list(grouped) == [[1], [2], [0]]
    assert list(BatchSampler([3, 9, 5], 2, shuffle=False, group_by_length=False)) == [[0, 1], [2]]


def test_no_rows_no_batches():
    sampler = BatchSampler([], 2, shuffle=True)
    assert len(sampler) == 0 and list(sampler) == []
