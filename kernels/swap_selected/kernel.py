"""Exchange the selected entries of many weights with values kept beside them, in Triton.

A program reads a block of values as one stream and exchanges it entry by entry with the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_align_kernels import launch_tables
from lit_align_kernels.entries import Entries
from lit_align_kernels.selected_positions import (
    NUMEL,
    OWN,
    entries_of_program,
    field,
    pointer,
    positions_in_block,
    positions_of_rest,
    rest_of_block,
    weight_pointer,
)
from lit_align_kernels.swap_selected.reference import Operation

TILE = 512  # words of a bitmap in one step

VALUES = tl.constexpr(OWN.value)


@triton.jit
def exchange(weight, values, mask, OPERATION: tl.constexpr):
    """Move the entries where `mask` holds; casts to the other dtype where it differs."""
    if OPERATION == "swap":
        old = tl.load(weight, mask=mask)  # scattered
        new = tl.load(values, mask=mask)  # stream
        tl.store(weight, new, mask=mask)  # scattered
        tl.store(values, old, mask=mask)  # stream
    elif OPERATION == "scatter":
        new = tl.load(values, mask=mask)  # stream
        tl.store(weight, new.to(weight.dtype.element_ty), mask=mask)  # scattered
    else:
        old = tl.load(weight, mask=mask)  # scattered
        tl.store(values, old.to(values.dtype.element_ty), mask=mask)  # stream


@triton.jit
def exchange_block(
    parameter, start, numel, rest,
    OPERATION: tl.constexpr, KIND: tl.constexpr, INDEX_TYPE: tl.constexpr, EVEN: tl.constexpr,
    WEIGHT_TYPE: tl.constexpr, VALUE_TYPE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Entries of one block up to a multiple of 16, so that masks do not break accesses up."""
    lane = tl.arange(0, BLOCK)
    count = tl.minimum(numel - start, BLOCK).to(tl.int32)
    whole = tl.multiple_of(count // 16 * 16, 16)
    positions = positions_in_block(parameter, start, count, KIND, INDEX_TYPE, EVEN, BLOCK, TILE)
    weight = weight_pointer(parameter, KIND, EVEN, WEIGHT_TYPE) + positions
    values = pointer(parameter, VALUES, ALIGNED, VALUE_TYPE) + start + lane
    exchange(weight, values, lane < whole, OPERATION)
    return rest_of_block(rest, positions, whole, count, KIND)


@triton.jit
def swap_selected_kernel(
    table, programs,
    OPERATION: tl.constexpr, KIND: tl.constexpr, INDEX_TYPE: tl.constexpr, EVEN: tl.constexpr,
    WEIGHT_TYPE: tl.constexpr, VALUE_TYPE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A few blocks of one parameter's entries, and what of them fills no 16."""
    parameter, start = entries_of_program(table, programs, BLOCK * BLOCKS)
    numel = field(parameter, NUMEL)
    rest = tl.zeros((16,), tl.int64)
    for block in tl.static_range(BLOCKS):
        if start + block * BLOCK < numel:
            rest = exchange_block(
                parameter, start + block * BLOCK, numel, rest, OPERATION, KIND, INDEX_TYPE, EVEN,
                WEIGHT_TYPE, VALUE_TYPE, ALIGNED, BLOCK, TILE,
            )  # fmt: skip
    whole = numel // 16 * 16
    if (whole < numel) & (start <= whole) & (whole < start + BLOCK * BLOCKS):
        entry = whole + tl.arange(0, 16)
        mask = entry < numel
        at = positions_of_rest(parameter, entry, mask, rest, KIND, INDEX_TYPE)
        weight = weight_pointer(parameter, KIND, False, WEIGHT_TYPE) + at
        values = pointer(parameter, VALUES, False, VALUE_TYPE) + entry
        exchange(weight, values, mask, OPERATION)


def launch(
    exchanges: Sequence[tuple[Tensor, Entries, Tensor]], operation: Operation = "swap"
) -> None:
    """One launch for each combination of dtypes, alignment and kind of entries.

    Args:
        exchanges: (weight, entries, values) each, all of one device; the public functions have
            checked them.
        operation: `swap`, `scatter` (values into the weight, cast to its dtype) or `gather` (the
            weight's entries into the values, cast to theirs).
    """
    launches: dict[tuple[Any, ...], list[list[int]]] = {}
    block = launch_tables.block_entries()
    for weight, entries, values in exchanges:
        if entries.numel:
            placed, columns = launch_tables.place(weight, entries, entries.numel, block)
            key = (*placed, weight.dtype, values.dtype, launch_tables.aligned(values))
            launches.setdefault(key, []).append([*columns, values.data_ptr()])
    for key, rows in launches.items():
        device = exchanges[0][0].device
        numels = tuple(row[0] for row in rows)
        constants = constexprs(operation, *key, block=block)
        programs = launch_tables.programs(numels, block * constants["BLOCKS"], device)
        table = launch_tables.parameter_table(rows, device)
        with launch_tables.on_device_of(table):
            swap_selected_kernel[(len(programs),)](
                table, programs, **constants, num_warps=launch_tables.num_warps()
            )


def constexprs(
    operation: Operation,
    kind: str,
    index_type: torch.dtype,
    even: bool,
    weight: torch.dtype,
    values: torch.dtype,
    aligned: bool,
    *,
    block: int,
) -> dict[str, Any]:
    """Arguments of `swap_selected_kernel` that are constants."""
    # With fp32 registers would be spilled. Half the words in a small block: a tenth faster (H100).
    narrow = weight == values and weight.itemsize == 2
    return {
        "OPERATION": operation,
        "KIND": kind,
        "INDEX_TYPE": launch_tables.TRITON_TYPES[index_type],
        "EVEN": even,
        "WEIGHT_TYPE": launch_tables.TRITON_TYPES[weight],
        "VALUE_TYPE": launch_tables.TRITON_TYPES[values],
        "ALIGNED": aligned,
        "BLOCK": block,
        "BLOCKS": 4 if narrow else 2,  # of a program
        "TILE": TILE // 2 if narrow and block < 1024 else TILE,
    }
