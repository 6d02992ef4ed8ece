"""The train loader's place within an epoch is part of a checkpoint."""

import pytest
import torch

from lit_align.errors import DataError
from tests.training_runs import instructions


def row_ids(loader) -> list[list[int]]:
    return [batch.row_ids.tolist() for batch in loader]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_goes_on_after_the_batches_that_were_handed_out(num_workers):
    data = instructions(11, batch_size=3, num_workers=num_workers)
    data.setup("fit")
    whole = row_ids(data.train_dataloader())
    iterator = iter(first := data.train_dataloader())
    for _ in range(2):
        next(iterator)
    state = first.state_dict()
    assert state == {"num_batches": 2}
    data.load_state_dict(state)
    second = data.train_dataloader()
    assert len(second) == len(whole)
    assert row_ids(second) == whole[2:]
    assert row_ids(second) == whole  # the epoch after the resumed one is whole
    assert row_ids(data.train_dataloader()) == whole


def test_at_the_end_of_an_epoch_nothing_is_left_out():
    data = instructions(4, batch_size=2)
    data.setup("fit")
    iterator = iter(loader := data.train_dataloader())
    for _ in range(2):
        next(iterator)
    assert loader.state_dict() == {"num_batches": 0}


def test_batches_are_no_collections_whose_tensors_lightning_would_cast():
    from lightning.pytorch.plugins import HalfPrecision

    data = instructions(4, batch_size=2)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert HalfPrecision("bf16-true").convert_input(batch).token_weights.dtype == torch.float32


@pytest.mark.parametrize("state", [{}, [], 5, {"num_batches": -1}, {"num_batches": "2"},
                                   {"num_batches": 2**60}, {"num_batches": True}])  # fmt: skip
def test_a_place_that_is_none_is_refused(state):
    data = instructions(4, batch_size=2)
    data.setup("fit")
    with pytest.raises(DataError, match="place in the data is none"):
        data.load_state_dict(state)
