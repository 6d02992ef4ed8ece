"""Exact top-k over many tensors, one at a time: radix select on order-preserving integer keys.

A float's bits, read as an unsigned integer after flipping the sign bit of positive numbers and all
bits of negative ones, are ordered as the floats are. So the k-th largest score is found by
histograms of 16 bits a pass (two passes for fp32, four for fp64), without sorting or holding more
than a chunk of keys. Equal scores are taken in the order of the mapping, then of the position.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_align.errors import LocalizationError
from lit_align.masks import bitmap as bits
from lit_align.masks.granularity import Selection

CHUNK = 2**19  # entries; a multiple of 8, so that chunks end on a byte of the bitmap
_DIGIT_BITS = 16
_DIGITS = 2**_DIGIT_BITS
_CHANGED = "the scores changed between two reads of them"
_NUM_BYTES = {torch.float32: 4, torch.float64: 8}


@dataclasses.dataclass(frozen=True)
class Threshold:
    """The k-th largest score: everything above it is taken, and the first of its equals.

    Attributes:
        key: its integer key.
        dtype: fp32 or fp64, the precision of the keys.
        k: how many entries are taken.
        above: how many scores are larger.
        equal: how many scores are equal, itself included.
    """

    key: int
    dtype: torch.dtype
    k: int
    above: int
    equal: int

    @property
    def value(self) -> float:
        """The score itself."""
        num_bytes = _NUM_BYTES[self.dtype]
        sign = 1 << (8 * num_bytes - 1)
        pattern = self.key ^ sign if self.key & sign else self.key ^ (2 * sign - 1)
        code = "<f" if num_bytes == 4 else "<d"
        return struct.unpack(code, pattern.to_bytes(num_bytes, "little"))[0]

    @property
    def equals_taken(self) -> int:
        """How many of the equal scores are taken."""
        return self.k - self.above

    @property
    def undecided(self) -> int:
        """Scores at the threshold, where only some of them are taken; else 0."""
        return self.equal if self.equals_taken < self.equal else 0


def top_k(
    scores: Mapping[str, Tensor], k_of_total: Callable[[int], int]
) -> tuple[dict[str, Selection], Threshold]:
    """The `k_of_total(number of scores)` largest scores, as one selection a tensor.

    `scores` is read three times (five times for fp64), one tensor at a time.

    Raises:
        LocalizationError: a score is NaN, not a float, or differs between two reads; no scores.
    """
    threshold = _find_threshold(scores, k_of_total, torch.float32)
    remaining = threshold.equals_taken
    selections = {}
    for name in scores:
        selections[name], taken = _mark(name, scores[name], threshold, remaining)
        remaining -= taken
    if sum(selection.count() for selection in selections.values()) != threshold.k:
        raise LocalizationError(_CHANGED)
    return selections, threshold


def _find_threshold(
    scores: Mapping[str, Tensor], k_of_total: Callable[[int], int], dtype: torch.dtype
) -> Threshold:
    width = 8 * _NUM_BYTES[dtype]
    k = prefix = above = equal = 0
    for shift in range(width - _DIGIT_BITS, -1, -_DIGIT_BITS):
        first = shift == width - _DIGIT_BITS
        histogram = np.zeros(_DIGITS, np.int64)
        for name in scores:
            tensor = scores[name]
            if tensor.dtype == torch.float64 and dtype != torch.float64:
                return _find_threshold(scores, k_of_total, torch.float64)
            for _, keys in _chunks(name, tensor, dtype):
                if not first:
                    keys = keys[keys >> (shift + _DIGIT_BITS) == prefix]
                digits = (keys >> shift) & (_DIGITS - 1)
                histogram += np.bincount(digits.astype(np.intp), minlength=_DIGITS)
        if first:
            k = _checked_k(k_of_total, int(histogram.sum()))
        from_top = np.cumsum(histogram[::-1])
        place = int(np.searchsorted(from_top, k - above))
        if place == _DIGITS:
            raise LocalizationError(_CHANGED)
        digit = _DIGITS - 1 - place
        equal = int(histogram[digit])
        above += int(from_top[place]) - equal
        prefix = prefix << _DIGIT_BITS | digit
    return Threshold(prefix, dtype, k, above, equal)


def _checked_k(k_of_total: Callable[[int], int], total: int) -> int:
    if total == 0:
        raise LocalizationError("there are no scores to select from")
    return k_of_total(total)


def _mark(
    name: str, tensor: Tensor, threshold: Threshold, equals_wanted: int
) -> tuple[Selection, int]:
    """The selection of one tensor, and how many of the scores at the threshold it used up."""
    bitmap = np.zeros(bits.num_bytes(tensor.numel()), np.uint8)
    taken = 0
    for start, keys in _chunks(name, tensor, threshold.dtype):
        chosen = keys > threshold.key
        if taken < equals_wanted:
            equals = np.flatnonzero(keys == threshold.key)[: equals_wanted - taken]
            chosen[equals] = True
            taken += len(equals)
        packed = bits.pack(chosen)
        bitmap[start // 8 : start // 8 + len(packed)] = packed
    return Selection.of_bitmap(tensor.shape, torch.from_numpy(bitmap)), taken


def _chunks(
    name: str, tensor: Tensor, dtype: torch.dtype
) -> Iterator[tuple[int, NDArray[np.unsignedinteger]]]:
    """(flat start, keys) of one tensor, `CHUNK` entries at a time."""
    if not tensor.is_floating_point():
        raise LocalizationError(f"the scores of {name!r} are {tensor.dtype}, not floats")
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), CHUNK):
        values = flat[start : start + CHUNK].to("cpu", dtype).numpy()
        if np.isnan(values).any():
            raise LocalizationError(f"the scores of {name!r} contain NaN")
        yield start, _keys(values)


def _keys(values: np.ndarray) -> NDArray[np.unsignedinteger]:
    width = values.itemsize * 8
    signed = (values + 0.0).view(f"i{values.itemsize}")  # + 0.0 makes -0.0 equal to 0.0
    unsigned = signed.view(f"u{values.itemsize}")
    negative = (signed >> (width - 1)).view(unsigned.dtype)  # all ones for negative numbers
    return unsigned ^ (negative | unsigned.dtype.type(1 << (width - 1)))
