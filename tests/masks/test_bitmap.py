import numpy as np
import pytest

from lit_align.masks import bitmap as bits


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 507])
def test_round_trip_and_count(numel):
    flags = np.random.default_rng(numel).random(numel) < 0.4
    bitmap = bits.pack(flags)
    assert bitmap.shape == (bits.num_bytes(numel),)
    assert np.array_equal(bits.unpack(bitmap, numel), flags)
    assert bits.popcount(bitmap) == flags.sum()


def test_bit_i_of_byte_j_is_position_8j_plus_i():
    flags = np.zeros(20, np.bool_)
    flags[[0, 9, 19]] = True
    assert bits.pack(flags).tolist() == [1, 2, 8]


def test_tail():
    bitmap = np.full(2, 255, np.uint8)
    assert bits.has_stray_bits(bitmap, 11) and not bits.has_stray_bits(bitmap, 16)
    assert bits.clear_tail(bitmap, 11).tolist() == [255, 7]
    assert not bits.has_stray_bits(bitmap, 11)
