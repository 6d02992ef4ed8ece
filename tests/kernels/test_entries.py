import math

import pytest
import torch

from lit_align_kernels.entries import Entries
from tests.kernels.cases import KINDS, KINDS_3D, entries_of, flat_order


@pytest.mark.parametrize("shape", [(11, 7), (1, 7), (7, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_numel_counts_the_selected_entries(kind, shape):
    entries = entries_of(kind, shape)
    assert entries.numel == flat_order(entries).numel()


@pytest.mark.parametrize("kind", KINDS_3D)
def test_rows_of_a_3d_weight_are_those_of_its_flattening(kind):
    entries = entries_of(kind, (3, 5, 7))
    assert entries.numel == flat_order(entries).numel()
    assert entries.row_length == 7


def test_row_length():
    rows = torch.tensor([0, 2])
    assert Entries("rows", (5, 3), rows=rows).row_length == 3
    assert Entries("rows", (5, 3), axis=1, rows=rows).row_length == 5
    assert Entries("all", ()).row_length == 1
    assert Entries("all", ()).numel == 1


def test_to_keeps_what_is_there_already():
    for kind in KINDS:
        entries = entries_of(kind, (11, 7))
        assert entries.to(torch.device("cpu")) is entries


def test_to_moves_every_index_tensor():
    moved = entries_of("elements", (11, 7)).to(torch.device("meta"))
    assert moved.positions.device.type == moved.row_offsets.device.type == "meta"
    assert moved.positions.dtype == torch.int32
    assert entries_of("rows", (11, 7)).to(torch.device("meta")).rows.device.type == "meta"


@pytest.mark.parametrize("shape", [(11, 7), (3, 5, 7)])
def test_row_offsets_of_the_cases_delimit_rows(shape):
    entries = entries_of("elements", shape)
    for row in range(math.prod(shape[:-1])):
        first, last = entries.row_offsets[row : row + 2].tolist()
        assert ((entries.positions[first:last] // shape[-1]) == row).all()
    assert entries.row_offsets[-1] == entries.numel


@pytest.mark.parametrize("kind", ["elements", "elements in int64", "elements, every"])
def test_bitmap_has_a_bit_for_every_position(kind):
    entries = entries_of(kind, (11, 7))
    words = entries.bitmap()
    assert words.shape == (3,) and words.dtype == torch.int32
    bits = (words[:, None] >> torch.arange(32)) & 1
    assert torch.equal(bits.reshape(-1).nonzero()[:, 0], entries.positions.long())
    assert entries.bitmap() is words


def test_bitmap_of_nothing():
    assert not entries_of("elements, none", (11, 7)).bitmap().any()


def test_positions_shrink_on_other_devices_where_they_fit():
    entries = entries_of("elements in int64", (11, 7))
    assert entries.to(torch.device("cpu")) is entries
    assert entries.to(torch.device("meta")).positions.dtype == torch.int32
    entries.shape = (2**20, 2**12)
    assert entries.to(torch.device("meta")).positions.dtype == torch.int64
