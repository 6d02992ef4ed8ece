"""The selected entries of `aᵀ b`, without ever holding the whole product. Plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_align_kernels.entries import Entries
from lit_align_kernels.products import add_product, product, write_product

BLOCK_ENTRIES = 1 << 20  # entries of the dense product that exist at once (4 MiB in fp32)


def masked_weight_grad(
    a: Tensor, b: Tensor, entries: Entries, out: Tensor, accumulate: bool
) -> None:
    """Write the selected entries of `aᵀ b` to `out`, or add them; see the package's function."""
    if entries.kind == "elements":
        _elements(a, b, entries, out, accumulate)
        return
    if entries.kind == "rows":
        assert entries.rows is not None
        if entries.axis == 1:
            a, b = b, a
        a = a.index_select(1, entries.rows)
    (add_product if accumulate else write_product)(out.view(a.shape[1], b.shape[1]), a.t(), b)


def _elements(a: Tensor, b: Tensor, entries: Entries, out: Tensor, accumulate: bool) -> None:
    assert entries.positions is not None
    rows, width = entries.shape
    step = max(1, BLOCK_ENTRIES // width)
    bounds = [*entries.counts_before(range(0, rows, step)), entries.numel]
    for i, start in enumerate(range(0, rows, step)):
        first, last = bounds[i : i + 2]
        if first == last:
            continue
        block = product(a[:, start : start + step].t(), b)
        local = entries.positions[first:last] - start * width
        if accumulate or block.dtype != out.dtype:
            chosen = block.view(-1).index_select(0, local)
            out[first:last].add_(chosen) if accumulate else out[first:last].copy_(chosen)
        else:
            torch.index_select(block.view(-1), 0, local, out=out[first:last])


def gather_block(block: Tensor, entries: Entries, start: int, stop: int, out: Tensor) -> None:
    """Copy the selected entries of rows [start, stop) from `block` into `out`, in place.

    Args:
        block: (stop - start, width), rows [start, stop) of the dense tensor (axis 0).
        entries: of the dense tensor, any kind.
        start: first row of the block.
        stop: one past the last row of the block.
        out: (M,) fp32, all selected entries in order; the block's share is written.
    """
    width = block.shape[1]
    if entries.kind == "all":
        out[start * width : stop * width] = block.reshape(-1)
    elif entries.kind == "rows" and entries.axis == 1:
        assert entries.rows is not None
        columns = out.view(entries.rows.numel(), entries.row_length)
        columns[:, start:stop] = block.index_select(1, entries.rows).t()
    elif entries.kind == "rows":
        assert entries.rows is not None
        first, last = entries.counts_before([start, stop])
        chosen = block.index_select(0, entries.rows[first:last] - start)
        out[first * width : last * width] = chosen.reshape(-1)
    else:
        assert entries.positions is not None
        first, last = entries.counts_before([start, stop])
        local = entries.positions[first:last] - start * width
        out[first:last] = block.reshape(-1).index_select(0, local)
