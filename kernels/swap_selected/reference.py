"""Read, write and exchange the selected entries of a weight, in plain torch.

`values` hold the entries in the order of `Entries`: row by row for `rows` (a column of the weight
is one contiguous row of `values` where axis = 1), by increasing position for the other kinds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lit_align_kernels.entries import Entries

Operation = Literal["swap", "scatter", "gather"]


def _rows_view(weight: Tensor, axis: int) -> Tensor:
    """A view whose row r is the weight's row r along `axis`."""
    return weight.t() if axis == 1 else weight.view(-1, weight.shape[-1] if weight.ndim else 1)


def gather_entries(weight: Tensor, entries: Entries) -> Tensor:
    """The selected entries of `weight`, flat, in the weight's dtype: (M,)."""
    if entries.kind == "all":
        return weight.reshape(-1).clone()
    if entries.kind == "rows":
        assert entries.rows is not None
        return _rows_view(weight, entries.axis).index_select(0, entries.rows).reshape(-1)
    assert entries.positions is not None
    return weight.view(-1).index_select(0, entries.positions)


def _write_rows(view: Tensor, rows: Tensor, values: Tensor) -> None:
    """`view[rows] = values` by NumPy, which takes about two thirds of `index_copy_`'s time."""
    bits = torch.int16 if view.element_size() == 2 else view.dtype  # NumPy has no bf16
    view.view(bits).numpy()[rows.numpy()] = values.contiguous().view(bits).numpy()
    torch.autograd.graph.increment_version(view)  # a graph that needs the old values must fail


@torch.no_grad()
def scatter_entries_(weight: Tensor, entries: Entries, values: Tensor) -> None:
    """Write `values` (M,) into the selected entries of `weight`, in place, cast to its dtype."""
    values = values.detach().to(weight.dtype)
    if entries.kind == "all":
        weight.copy_(values.view(weight.shape))
    elif entries.kind == "rows":
        assert entries.rows is not None
        view = _rows_view(weight, entries.axis)
        values = values.view(entries.rows.numel(), view.shape[1])
        if weight.device.type == "cpu" and entries.axis == 0:
            _write_rows(view.detach(), entries.rows, values)
        else:
            view.index_copy_(0, entries.rows, values)
    else:
        assert entries.positions is not None
        # Not index_put_: it takes half as long again on a CPU.
        weight.view(-1).index_copy_(0, entries.positions.long(), values)


@torch.no_grad()
def swap_selected_(weight: Tensor, entries: Entries, values: Tensor) -> None:
    """Exchange `values` (M,) and the selected entries of `weight`, both in place."""
    current = gather_entries(weight, entries)
    scatter_entries_(weight, entries, values)
    values.copy_(current)


@torch.no_grad()
def gather_entries_into_(weight: Tensor, entries: Entries, values: Tensor) -> None:
    """Copy the selected entries of `weight` into `values` (M,), cast to their dtype."""
    values.copy_(gather_entries(weight, entries))


OPERATIONS: dict[Operation, Callable[[Tensor, Entries, Tensor], None]] = {
    "swap": swap_selected_,
    "scatter": scatter_entries_,
    "gather": gather_entries_into_,
}
