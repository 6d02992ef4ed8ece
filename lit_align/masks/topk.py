"""Exact top-k over many tensors, a part at a time: radix select on order-preserving integer keys.

A float's bits, read as an unsigned integer after flipping the sign bit of positive numbers and all
bits of negative ones, are ordered as the floats are. A histogram of the keys' first 16 bits says in
which bin the k-th largest score is; a second pass marks what lies above that bin and keeps the keys
inside it, which are few, to be ranked at once. Where they are many (equal scores), the bin is
divided by a histogram of the next 16 bits first. Nothing is sorted, and nothing but a part of the
keys and that bin is held. Equal scores are taken in the order of the mapping, then of the position.
"""

from __future__ import annotations

import contextlib
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
from lit_align.masks.parts import OpenScores

Keys = NDArray[np.unsignedinteger]
MAX_KEPT = 2**23  # keys of one bin that are kept for ranking, 12 or 16 bytes each
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


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Parts are small: waking a second thread for each operation cost five times the work itself.

    (Measured on two virtual cores; threads of the whole process, given back at the end.)
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def top_k(
    scores: Mapping[str, Tensor], k_of_total: Callable[[int], int]
) -> tuple[dict[str, Selection], Threshold]:
    """The `k_of_total(number of scores)` largest scores, as one selection a tensor.

    `scores` is read twice, more often where very many lie about the threshold (three times for
    fp32, five for fp64); `PartialScores` part by part, others one tensor at a time.

    Raises:
        LocalizationError: a score is NaN, not a float, or differs between two reads; no scores.
    """
    cut = _find_bin(scores, k_of_total, torch.float32)
    marked: dict[str, _Marked] = {}
    left = cut.wanted
    for name in scores:
        marked[name] = _mark(OpenScores(scores, name), cut, left)
        left -= marked[name].equals_taken
    counts = [(part.above, part.inside) for part in marked.values()]
    if tuple(map(sum, zip(*counts, strict=True))) != (cut.above, cut.inside):
        raise LocalizationError(_CHANGED)
    threshold = _rank_inside(list(marked.values()), cut)
    return {name: part.selection() for name, part in marked.items()}, threshold


@dataclasses.dataclass(frozen=True)
class _Bin:
    """Where the k-th largest key is: among those whose bits from `shift` on are `prefix`."""

    prefix: int
    shift: int
    dtype: torch.dtype
    k: int
    above: int  # keys above the bin
    inside: int  # keys in it

    @property
    def wanted(self) -> int:
        """How many of the keys inside are taken."""
        return self.k - self.above

    @property
    def bounds(self) -> tuple[int, int]:
        """Its lowest and its highest key."""
        return self.prefix << self.shift, (self.prefix + 1 << self.shift) - 1


def _find_bin(
    scores: Mapping[str, Tensor], k_of_total: Callable[[int], int], dtype: torch.dtype
) -> _Bin:
    k = prefix = above = 0
    inside = MAX_KEPT + 1
    shift = width = 8 * _NUM_BYTES[dtype]
    while shift and inside > MAX_KEPT:
        first, shift = shift == width, shift - _DIGIT_BITS
        histogram = _histogram(scores, dtype, None if first else prefix, shift)
        if histogram is None:
            return _find_bin(scores, k_of_total, torch.float64)
        if first:
            k = _checked_k(k_of_total, int(histogram.sum()))
        from_top = np.cumsum(histogram[::-1])
        place = int(np.searchsorted(from_top, k - above))
        if place == _DIGITS:
            raise LocalizationError(_CHANGED)
        digit = _DIGITS - 1 - place
        inside = int(histogram[digit])
        above += int(from_top[place]) - inside
        prefix = prefix << _DIGIT_BITS | digit
    return _Bin(prefix, shift, dtype, k, above, inside)


def _histogram(
    scores: Mapping[str, Tensor], dtype: torch.dtype, prefix: int | None, shift: int
) -> NDArray[np.int64] | None:
    """How often each digit (the 16 bits from `shift` on) comes after `prefix`.

    None where a score is fp64 and `dtype` is not.
    """
    histogram = np.zeros(_DIGITS, np.int64)
    for name in scores:
        for _, part in OpenScores(scores, name).parts():
            if part.dtype == torch.float64 and dtype != torch.float64:
                return None
            keys = _keys(name, part, dtype)
            if prefix is not None:
                keys = keys[keys >> (shift + _DIGIT_BITS) == prefix]
            digits = ((keys >> shift) & (_DIGITS - 1)).view(f"i{keys.itemsize}")
            histogram += torch.bincount(torch.from_numpy(digits), minlength=_DIGITS).numpy()
    return histogram


def _checked_k(k_of_total: Callable[[int], int], total: int) -> int:
    if total == 0:
        raise LocalizationError("there are no scores to select from")
    return k_of_total(total)


@dataclasses.dataclass
class _Marked:
    """One tensor: what lies above a bin is marked in the bitmap, what lies inside is kept.

    Of a bin of one key alone nothing is kept: the first of those equals are marked at once.
    """

    shape: tuple[int, ...]
    bitmap: bits.Bitmap
    above: int = 0
    inside: int = 0
    equals_taken: int = 0
    positions: list[NDArray[np.intp]] = dataclasses.field(default_factory=list)
    keys: list[Keys] = dataclasses.field(default_factory=list)

    def selection(self) -> Selection:
        """Of what is marked."""
        return Selection.of_bitmap(self.shape, torch.from_numpy(self.bitmap))


def _mark(scores: OpenScores, cut: _Bin, equals_wanted: int) -> _Marked:
    marked = _Marked(scores.shape, np.zeros(bits.num_bytes(scores.numel), np.uint8))
    lowest, highest = cut.bounds
    for start, part in scores.parts():
        keys = _keys(scores.name, part, cut.dtype)
        above, inside = keys > highest, keys >= lowest
        inside ^= above
        places = np.flatnonzero(inside)
        marked.above += int(np.count_nonzero(above))
        marked.inside += len(places)
        if cut.shift == 0:
            first = places[: equals_wanted - marked.equals_taken]
            above[first] = True
            marked.equals_taken += len(first)
        elif len(places):
            marked.positions.append(places + start)
            marked.keys.append(keys[places])
        packed = bits.pack(above)
        marked.bitmap[start // 8 : start // 8 + len(packed)] = packed
    return marked


def _rank_inside(marked: list[_Marked], cut: _Bin) -> Threshold:
    """Mark the largest of the keys that were kept; the threshold."""
    if cut.shift == 0:
        return Threshold(cut.prefix, cut.dtype, cut.k, cut.above, cut.inside)
    keys = np.concatenate([keys for part in marked for keys in part.keys])
    place = len(keys) - cut.wanted
    key = np.partition(keys, place)[place]
    above = int(np.count_nonzero(keys > key))
    left = cut.wanted - above
    for part in marked:
        for positions, keys_of_part in zip(part.positions, part.keys, strict=True):
            chosen = keys_of_part > key
            equals = np.flatnonzero(keys_of_part == key)[:left]
            chosen[equals] = True
            left -= len(equals)
            bits.set_bits(part.bitmap, positions[chosen])
    equal = int(np.count_nonzero(keys == key))
    return Threshold(int(key), cut.dtype, cut.k, cut.above + above, equal)


def _keys(name: str, part: Tensor, dtype: torch.dtype) -> Keys:
    """Unsigned integers in the order of the scores."""
    values = part.to(dtype).numpy()
    if np.isnan(values).any():
        raise LocalizationError(f"the scores of {name!r} contain NaN")
    width = values.itemsize * 8
    signed = values.view(f"i{values.itemsize}")
    unsigned = signed.view(f"u{values.itemsize}")
    sign = unsigned.dtype.type(1 << (width - 1))
    if signed.min(initial=0) >= 0:  # as all localizers' scores are: the sign bit is nowhere set
        return unsigned | sign
    signed = (values + 0.0).view(signed.dtype)  # makes -0.0 equal to 0.0
    negative = (signed >> (width - 1)).view(unsigned.dtype)  # all ones for negative numbers
    return signed.view(unsigned.dtype) ^ (negative | sign)
