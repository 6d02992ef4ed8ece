"""Which entries of one weight train, as the kernels see them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor


@dataclasses.dataclass
class Entries:
    """The selected entries of one parameter, in the order in which `selected` stores them.

    Attributes:
        kind: `all` (every entry, row-major), `rows` (whole rows along `axis`) or `elements`.
        shape: shape of the parameter.
        axis: for `rows`: 0 = rows of `weight.reshape(-1, shape[-1])`, 1 = columns of a 2-D weight
            (an output unit of GPT-2's `Conv1D` is a column).
        rows: (R,) int64, increasing; only for `rows`.
        positions: (M,) increasing row-major positions, int64 on a CPU (torch scatters by nothing
            else, and a cast at every step costs more than the memory), int32 elsewhere if they fit;
            only for `elements`.
        row_offsets: (rows + 1,) int64: the positions of row r are
            `positions[row_offsets[r]:row_offsets[r + 1]]`; only for `elements`.
        cache: tables that kernels derive from the entries once; they stand on the same device.
    """

    kind: Literal["all", "rows", "elements"]
    shape: tuple[int, ...]
    axis: int = 0
    rows: Tensor | None = None
    positions: Tensor | None = None
    row_offsets: Tensor | None = None
    cache: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @property
    def numel(self) -> int:
        """How many entries are selected."""
        if self.kind == "elements":
            assert self.positions is not None
            return self.positions.numel()
        if self.kind == "rows":
            assert self.rows is not None
            return self.rows.numel() * self.row_length
        return math.prod(self.shape)

    @property
    def row_length(self) -> int:
        """Entries in one row."""
        if self.axis == 1:
            return self.shape[0]
        return self.shape[-1] if self.shape else 1

    def counts_before(self, rows: Sequence[int]) -> list[int]:
        """How much is selected before each of these rows, on the host.

        Selected rows for `rows` along axis 0, selected entries for `elements`. Waits for a GPU.
        """
        if self.kind == "rows":
            assert self.rows is not None
            wanted = torch.tensor(rows, device=self.rows.device)
            return torch.searchsorted(self.rows, wanted).tolist()
        assert self.row_offsets is not None
        return self.row_offsets[torch.tensor(rows, device=self.row_offsets.device)].tolist()

    def bitmap(self) -> Tensor:
        """The selected elements as bits: (ceil(numel of the weight / 32),) int32 words.

        Bit i of word w is the row-major position 32·w + i. Made once; only for `elements`.
        """
        if "bitmap" not in self.cache:
            assert self.positions is not None
            words = -(-math.prod(self.shape) // 32)
            bits = torch.ones_like(self.positions, dtype=torch.int32) << (self.positions & 31).int()
            empty = torch.zeros(words, dtype=torch.int32, device=self.positions.device)
            # Positions differ, so that adding the bits of a word is joining them.
            self.cache["bitmap"] = empty.index_add_(0, (self.positions >> 5).int(), bits)
        return self.cache["bitmap"]

    def to(self, device: torch.device) -> Entries:
        """The same entries with the index tensors on `device` (self where they already are)."""
        tensors = (self.rows, self.positions, self.row_offsets)
        rows, positions, row_offsets = (None if t is None else t.to(device) for t in tensors)
        if positions is not None and device.type != "cpu" and math.prod(self.shape) < 2**31:
            positions = positions.to(torch.int32)
        moved = (rows, positions, row_offsets)
        if all(new is old for new, old in zip(moved, tensors, strict=True)):
            return self
        return Entries(self.kind, self.shape, self.axis, rows, positions, row_offsets)
