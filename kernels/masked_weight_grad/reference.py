"""The selected entries of `aᵀ b`, without ever holding the whole product. Plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_align_kernels.entries import Entries

BLOCK_ENTRIES = 1 << 20  # entries of the dense product that exist at once (4 MiB in fp32)


def masked_weight_grad(a: Tensor, b: Tensor, entries: Entries) -> Tensor:
    """See `lit_align_kernels.masked_weight_grad.masked_weight_grad`."""
    if entries.kind == "all":
        return (a.t() @ b).reshape(-1).float()
    if entries.kind == "rows":
        assert entries.rows is not None
        if entries.axis == 1:
            a, b = b, a
        return (a.index_select(1, entries.rows).t() @ b).reshape(-1).float()
    return _elements(a, b, entries)


def _elements(a: Tensor, b: Tensor, entries: Entries) -> Tensor:
    out = torch.empty(entries.numel, dtype=torch.float32, device=a.device)
    rows, width = entries.shape
    step = max(1, BLOCK_ENTRIES // width)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        gather_block(a[:, start:stop].t() @ b, entries, start, stop, out)
    return out


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
        first, last = torch.searchsorted(
            entries.rows, torch.tensor([start, stop], device=block.device)
        ).tolist()
        chosen = block.index_select(0, entries.rows[first:last] - start)
        out[first * width : last * width] = chosen.reshape(-1)
    else:
        assert entries.positions is not None and entries.row_offsets is not None
        first, last = int(entries.row_offsets[start]), int(entries.row_offsets[stop])
        local = entries.positions[first:last] - start * width
        out[first:last] = block.reshape(-1).index_select(0, local)
