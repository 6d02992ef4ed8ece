"""Tables with which one launch handles the selected entries of many parameters.

A parameter is a row of addresses and numbers (`selected_positions` names the columns); a program
looks up which parameter, and which block of its entries, is its own. What depends on the mask alone
is made once and kept with the `Entries`; nothing here waits for a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from lit_align_kernels.entries import Entries

VECTOR_BYTES = 16
MOST_POSITIONS_PER_ENTRY = 32  # of a bitmap: with more, int32 positions are the shorter list
# Of the block with the longest gaps: one program walks through them alone. Twice the mean of the
# sparsest bitmap there is.
MOST_WORDS_PER_ENTRY_OF_A_BLOCK = 2


TRITON_TYPES: dict[torch.dtype | None, Any] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
    None: None,
}
Placement = tuple[str, torch.dtype, bool]  # KIND, INDEX_TYPE, EVEN


def block_entries(target: str | None = None) -> int:
    """Entries of a block: 8 for every thread of 2 warps of 32 threads, or of 4 of 64 on AMD.

    On an H100, 10 % of the elements of 134M parameters, in ms: AdamW 0.31 (1024 entries and 4
    warps: 0.39), swap 0.22 (0.39); of the rows 0.15 (0.16) and 0.06 (0.07). NVIDIA's GPUs before
    Hopper, which nothing was timed on, have 4 warps: with 2 Triton 3.6 spills registers there.

    Args:
        target: as `audit.compiled.TARGETS` name them; None: the GPU of this process.
    """
    return 2048 if _is_amd(target) else 256 * num_warps(target)


def num_warps(target: str | None = None) -> int:
    """Warps of a program; see `block_entries`."""
    return 4 if _is_amd(target) or _is_before_hopper(target) else 2


def _is_amd(target: str | None) -> bool:
    return torch.version.hip is not None if target is None else target.startswith("gfx9")


@functools.cache
def _is_before_hopper(target: str | None) -> bool:
    if target is not None:
        return target.startswith("sm_8")
    return torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0)


def aligned(*tensors: Tensor | None) -> bool:
    """Whether 16-byte accesses may be used on every one of these."""
    return all(t is None or t.data_ptr() % VECTOR_BYTES == 0 for t in tensors)


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch on the tensor's GPU; nothing to do for the interpreter's CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def place(
    weight: Tensor | None, entries: Entries | None, numel: int, block: int
) -> tuple[Placement, list[int]]:
    """How the kernels find `numel` entries of `weight`.

    Returns:
        the constexprs KIND, INDEX_TYPE and EVEN, and the columns up to OWN of the parameter's row.
    """
    if weight is not None and not weight.is_contiguous():
        raise ValueError("the weight must be contiguous: its entries are counted row-major")
    if weight is None or entries is None or entries.kind == "all":
        address = 0 if weight is None else weight.data_ptr()
        return ("all", torch.int64, aligned(weight)), [numel, address, 0, 0, 0, 0, 0, 0]
    if entries.kind == "rows":
        return _place_rows(weight, entries, block)
    return _place_elements(weight, entries, block)


def _place_rows(weight: Tensor, entries: Entries, block: int) -> tuple[Placement, list[int]]:
    assert entries.rows is not None
    rows, length = entries.rows, entries.row_length
    strides = [1, weight.shape[1]] if entries.axis == 1 else [length, 1]
    even = entries.axis == 0 and length % VECTOR_BYTES == 0 and aligned(weight)
    kind = "rows" if length >= block else "short_rows"
    numbers = [entries.numel, weight.data_ptr(), rows.data_ptr(), 0, length, *strides, len(rows)]
    return (kind, torch.int64, even), numbers


def _place_elements(weight: Tensor, entries: Entries, block: int) -> tuple[Placement, list[int]]:
    assert entries.positions is not None
    positions, numel, size = entries.positions, entries.numel, math.prod(entries.shape)
    most_words = MOST_WORDS_PER_ENTRY_OF_A_BLOCK * block
    if size > MOST_POSITIONS_PER_ENTRY * numel or longest_span(entries, block) > most_words:
        numbers = [numel, weight.data_ptr(), positions.data_ptr(), 0, 0, 0, 0, 0]
        return ("index", positions.dtype, aligned(positions)), numbers
    position_type = torch.int32 if size <= 2**31 else torch.int64
    words, spans_ = entries.bitmap(), spans(entries, block)
    numbers = [numel, weight.data_ptr(), words.data_ptr(), spans_.data_ptr(), 0, 0, 0, 0]
    return ("bitmap", position_type, False), numbers


def spans(entries: Entries, block: int) -> Tensor:
    """Word of the first entry of every block and its rank in that word; then the last word."""
    key = f"spans of {block}"
    if key not in entries.cache:
        assert entries.positions is not None
        positions = entries.positions.long()
        at = torch.arange(0, positions.numel() + block, block, device=positions.device)
        at[-1] = positions.numel() - 1
        words = positions[at] >> 5
        rank = at - torch.searchsorted(positions, words << 5)
        entries.cache[key] = torch.stack([words, rank], 1).int().contiguous()
    return entries.cache[key]


def longest_span(entries: Entries, block: int) -> int:
    """Most words of the bitmap that one block reads; waits for the device the first time."""
    key = f"longest span of {block}"
    if key not in entries.cache:
        first = spans(entries, block)[:, 0]
        entries.cache[key] = int((first[1:] - first[:-1]).max()) + 1
    return entries.cache[key]


@functools.lru_cache(maxsize=16)  # tables of a step's launches, and of those of a swap
def programs(numels: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """Parameter and block of every program of a launch: (programs, 2) int32."""
    blocks = torch.tensor([-(-numel // block) for numel in numels])
    parameter = torch.repeat_interleave(torch.arange(len(numels)), blocks)
    first = torch.cumsum(blocks, 0) - blocks
    block_number = torch.arange(len(parameter)) - first[parameter]
    return torch.stack([parameter, block_number], 1).int().to(device)


def parameter_table(rows: list[list[int]] | Tensor, device: torch.device) -> Tensor:
    """The rows of a launch on its device, padded to equal length: (parameters, 16) int64."""
    table = torch.zeros(len(rows), 16, dtype=torch.int64, pin_memory=device.type == "cuda")
    table[:, : len(rows[0])] = torch.as_tensor(rows)
    return table.to(device, non_blocking=True)
