"""Packed bitmaps: bit i of byte j stands for the flat position 8·j + i."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bitmap = NDArray[np.uint8]
Flags = NDArray[np.bool_]

_ONES_IN_TWO_BYTES = (
    np.unpackbits(np.arange(2**16, dtype=np.uint16).view(np.uint8))
    .reshape(-1, 16)
    .sum(1, dtype=np.uint8)
)
_POPCOUNT_CHUNK = 2**17


def num_bytes(numel: int) -> int:
    """Bytes of a bitmap over `numel` positions."""
    return (numel + 7) // 8


def pack(flags: Flags) -> Bitmap:
    """Flat flags as a bitmap; the bits past the end are zero."""
    return np.packbits(flags, bitorder="little")


def unpack(bitmap: Bitmap, numel: int) -> Flags:
    """The first `numel` bits as flat flags."""
    return np.unpackbits(bitmap, count=numel, bitorder="little").view(np.bool_)


def popcount(bitmap: Bitmap) -> int:
    """How many bits are set."""
    even = len(bitmap) // 2 * 2
    pairs = np.ascontiguousarray(bitmap[:even]).view(np.uint16)
    count = sum(map(int.bit_count, bitmap[even:].tolist()))
    for start in range(0, len(pairs), _POPCOUNT_CHUNK):  # numpy makes int64 of the indices
        ones = _ONES_IN_TWO_BYTES.take(pairs[start : start + _POPCOUNT_CHUNK])
        count += int(ones.sum(dtype=np.int64))
    return count


def set_bits(bitmap: Bitmap, positions: NDArray[np.intp]) -> None:
    """Set, in place, the bits at these flat positions."""
    np.bitwise_or.at(bitmap, positions >> 3, np.uint8(1) << (positions & 7).astype(np.uint8))


def clear_tail(bitmap: Bitmap, numel: int) -> Bitmap:
    """Zero, in place, the bits past position `numel`; returns the bitmap."""
    if numel % 8:
        bitmap[-1] &= (1 << numel % 8) - 1
    return bitmap


def has_stray_bits(bitmap: Bitmap, numel: int) -> bool:
    """Whether a bit past position `numel` is set."""
    return bool(numel % 8) and int(bitmap[-1]) >> (numel % 8) != 0
