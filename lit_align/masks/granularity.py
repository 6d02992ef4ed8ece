"""What is selected of one parameter: nothing, everything, whole rows, or single elements."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lit_align.errors import MaskError
from lit_align.masks import bitmap as bits
from lit_align_kernels.entries import Entries

Kind = Literal["none", "all", "rows", "elements"]
MAX_NUMEL = 2**62  # positions and byte counts must fit int64


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """The selected entries of one parameter; build it with the class methods, which normalise.

    Normalised: rows or elements that cover everything become `all`, empty ones become `none`, and
    so does a parameter without entries. An element of a 1-D parameter is its own row, so rows of
    such a parameter are stored as elements.

    Attributes:
        kind: which of the four.
        shape: the parameter's shape.
        axis: for `rows`: 0 = rows of `weight.reshape(-1, shape[-1])`; 1 = columns of a 2-D weight
            (the output units of GPT-2's `Conv1D`).
        rows: (R,) int64, increasing; only for `rows`.
        bitmap: (ceil(numel / 8),) uint8; bit i of byte j is the row-major position 8·j + i; only
            for `elements`.

    Raises:
        MaskError: the fields contradict each other (sizes, dtypes, bounds, order, stray bits).
    """

    kind: Kind
    shape: tuple[int, ...]
    axis: int = 0
    rows: Tensor | None = None
    bitmap: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise MaskError(f"unknown kind of selection {self.kind!r}")
        if any(type(n) is not int or n < 0 for n in self.shape) or self.numel > MAX_NUMEL:
            raise MaskError(f"impossible shape {self.shape}")
        if (self.kind == "rows") != (self.rows is not None):
            raise MaskError(f"a selection of kind {self.kind!r} and row indices contradict")
        if (self.kind == "elements") != (self.bitmap is not None):
            raise MaskError(f"a selection of kind {self.kind!r} and a bitmap contradict")
        if self.rows is not None:
            _check_rows(self.rows, self.shape, self.axis)
        if self.bitmap is not None:
            _check_bitmap(self.bitmap, self.numel)

    @classmethod
    def none(cls, shape: Iterable[int]) -> Selection:
        """Nothing of a parameter."""
        return cls("none", tuple(shape))

    @classmethod
    def all(cls, shape: Iterable[int]) -> Selection:
        """Everything of a parameter (`none` where it has no entries)."""
        shape = tuple(shape)
        return cls("all" if math.prod(shape) else "none", shape)

    @classmethod
    def of_rows(cls, shape: Iterable[int], rows: Tensor, axis: int = 0) -> Selection:
        """Whole rows (columns for axis 1), given by increasing int64 indices."""
        shape = tuple(shape)
        if len(shape) == 1:
            _check_indices(rows, shape[0])
            return cls.of_positions(shape, rows)
        _check_rows(rows, shape, axis)
        if rows.numel() == 0 or math.prod(shape) == 0:
            return cls.none(shape)
        if rows.numel() == num_rows(shape, axis):
            return cls.all(shape)
        return cls("rows", shape, axis, rows=rows)

    @classmethod
    def of_bitmap(cls, shape: Iterable[int], bitmap: Tensor) -> Selection:
        """Single elements, given by a packed bitmap (uint8)."""
        selection = cls("elements", tuple(shape), bitmap=bitmap)
        if selection.count() == 0:
            return cls.none(selection.shape)
        return cls.all(selection.shape) if selection.count() == selection.numel else selection

    @classmethod
    def of_dense(cls, dense: Tensor) -> Selection:
        """Single elements, given by a bool tensor of the parameter's shape."""
        if dense.dtype != torch.bool:
            raise MaskError(f"a dense mask is bool, not {dense.dtype}")
        flags = dense.detach().cpu().reshape(-1).numpy()
        return cls.of_bitmap(dense.shape, torch.from_numpy(bits.pack(flags)))

    @classmethod
    def of_positions(cls, shape: Iterable[int], positions: Tensor) -> Selection:
        """Single elements, given by increasing row-major positions (int64)."""
        shape = tuple(shape)
        _check_indices(positions, math.prod(shape))
        flags = np.zeros(math.prod(shape), np.bool_)
        flags[positions.numpy()] = True
        return cls.of_bitmap(shape, torch.from_numpy(bits.pack(flags)))

    @property
    def numel(self) -> int:
        """Entries of the parameter, selected or not."""
        return math.prod(self.shape)

    def count(self) -> int:
        """How many entries are selected."""
        return self._count

    @functools.cached_property
    def _count(self) -> int:
        if self.kind == "rows":
            assert self.rows is not None
            return self.rows.numel() * (self.numel // num_rows(self.shape, self.axis))
        if self.kind == "elements":
            assert self.bitmap is not None
            return bits.popcount(self.bitmap.numpy())
        return self.numel if self.kind == "all" else 0

    def flags(self) -> bits.Flags:
        """The selection as flat, row-major numpy flags."""
        if self.kind == "elements":
            assert self.bitmap is not None
            return bits.unpack(self.bitmap.numpy(), self.numel)
        flags = np.full(self.numel, self.kind == "all", np.bool_)
        if self.kind == "rows":
            assert self.rows is not None
            matrix = flags.reshape(-1, self.shape[-1])
            matrix[(slice(None),) * self.axis + (self.rows.numpy(),)] = True
        return flags

    def packed(self) -> bits.Bitmap:
        """The selection as a bitmap, whatever its kind."""
        if self.kind == "elements":
            assert self.bitmap is not None
            return self.bitmap.numpy()
        return bits.pack(self.flags())

    def dense(self) -> Tensor:
        """The selection as a bool tensor of the parameter's shape."""
        return torch.from_numpy(self.flags()).reshape(self.shape)

    def positions(self) -> Tensor:
        """The selected row-major positions, (count,) int64, increasing."""
        return torch.from_numpy(np.flatnonzero(self.flags()).astype(np.int64, copy=False))

    def entries(self) -> Entries:
        """The selection as the kernels take it.

        Raises:
            MaskError: nothing is selected, so there is nothing to train.
        """
        if self.kind == "none":
            raise MaskError("a parameter of which nothing is selected has no entries")
        if self.kind != "elements":
            return Entries(self.kind, self.shape, self.axis, rows=self.rows)
        positions = self.positions()
        starts = torch.arange(num_rows(self.shape, 0) + 1) * self.shape[-1]
        row_offsets = torch.searchsorted(positions, starts)
        return Entries("elements", self.shape, positions=positions, row_offsets=row_offsets)

    def __and__(self, other: Selection) -> Selection:
        _check_same_shape(self, other)
        if self.kind == "none" or other.kind == "all":
            return self
        if other.kind == "none" or self.kind == "all":
            return other
        if self._rows_align(other):
            return self._with_rows(np.intersect1d(_rows(self), _rows(other), assume_unique=True))
        return self._with_bitmap(self.packed() & other.packed())

    def __or__(self, other: Selection) -> Selection:
        _check_same_shape(self, other)
        if self.kind == "none" or other.kind == "all":
            return other
        if other.kind == "none" or self.kind == "all":
            return self
        if self._rows_align(other):
            return self._with_rows(np.union1d(_rows(self), _rows(other)))
        return self._with_bitmap(self.packed() | other.packed())

    def __invert__(self) -> Selection:
        if self.kind == "none":
            return Selection.all(self.shape)
        if self.kind == "all":
            return Selection.none(self.shape)
        if self.kind == "rows":
            every = np.arange(num_rows(self.shape, self.axis))
            return self._with_rows(np.setdiff1d(every, _rows(self), assume_unique=True))
        return self._with_bitmap(bits.clear_tail(~self.packed(), self.numel))

    def __sub__(self, other: Selection) -> Selection:
        return self & ~other

    def _rows_align(self, other: Selection) -> bool:
        return self.kind == other.kind == "rows" and self.axis == other.axis

    def _with_rows(self, rows: np.ndarray) -> Selection:
        return Selection.of_rows(self.shape, torch.from_numpy(rows), self.axis)

    def _with_bitmap(self, bitmap: bits.Bitmap) -> Selection:
        return Selection.of_bitmap(self.shape, torch.from_numpy(bitmap))


def num_rows(shape: tuple[int, ...], axis: int) -> int:
    """Rows of `weight.reshape(-1, shape[-1])` for axis 0, columns for axis 1."""
    return shape[-1] if axis == 1 else math.prod(shape[:-1])


def _rows(selection: Selection) -> np.ndarray:
    assert selection.rows is not None
    return selection.rows.numpy()


def _check_same_shape(a: Selection, b: Selection) -> None:
    if a.shape != b.shape:
        raise MaskError(f"selections of shapes {a.shape} and {b.shape} cannot be combined")


def _check_indices(indices: Tensor, bound: int) -> None:
    if indices.dtype != torch.int64 or indices.ndim != 1:
        raise MaskError(f"indices are 1-D int64, not {indices.ndim}-D {indices.dtype}")
    if indices.numel() == 0:
        return
    if int(indices[0]) < 0 or int(indices[-1]) >= bound:
        raise MaskError(f"indices {int(indices[0])}..{int(indices[-1])} are outside [0, {bound})")
    if not bool((indices[1:] > indices[:-1]).all()):
        raise MaskError("indices are not strictly increasing (unsorted, or one is there twice)")


def _check_rows(rows: Tensor, shape: tuple[int, ...], axis: int) -> None:
    if not ((axis == 0 and len(shape) >= 2) or (axis == 1 and len(shape) == 2)):
        raise MaskError(f"a parameter of shape {shape} has no rows along axis {axis}")
    _check_indices(rows, num_rows(shape, axis))


def _check_bitmap(bitmap: Tensor, numel: int) -> None:
    if bitmap.dtype != torch.uint8 or bitmap.shape != (bits.num_bytes(numel),):
        raise MaskError(
            f"a bitmap over {numel} entries is uint8 of shape ({bits.num_bytes(numel)},), "
            f"not {bitmap.dtype} of shape {tuple(bitmap.shape)}"
        )
    if bits.has_stray_bits(bitmap.numpy(), numel):
        raise MaskError(f"bits are set past the last of the {numel} entries")
