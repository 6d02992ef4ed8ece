"""Selected entries of weights exchanged with values kept beside them.

The values are contiguous (the narrow accesses are those of a parameter's last 15 entries at most);
the weight is *scattered*: read and written where the mask says, an entry at a time, or in 16 bytes
where rows have a length that 16 divides. A 16-bit entry in a sector of its own is what sectors ÷
moved shows. Deltas are written, and trained values brought into and out of the weights, by the
same kernel without the half that is not needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_align_kernels import launch_tables
from lit_align_kernels.audit.compiled import CompileCase
from lit_align_kernels.audit.traffic import TrafficCase
from lit_align_kernels.entries import Entries
from lit_align_kernels.swap_selected import kernel
from lit_align_kernels.swap_selected.reference import Operation

SIGNATURE = {"table": "*i64", "programs": "*i32"}
INT32, INT64 = torch.int32, torch.int64


def compile_cases(target: str) -> list[CompileCase]:
    """Every kind of entries in two dtypes; the values are tensors of their own, hence aligned."""
    block = launch_tables.block_entries(target)
    kinds = {
        "bitmap": ("bitmap", INT32, False),
        "list": ("index", INT32, True),
        "rows": ("rows", INT64, True),
        "rows of odd length": ("rows", INT64, False),
        "short rows": ("short_rows", INT64, False),
        "whole": ("all", INT64, True),
    }
    bf16, fp32 = torch.bfloat16, torch.float32
    cases = {
        f"{name}, {dtype}": kernel.constexprs("swap", *placed, dtype, dtype, True, block=block)
        for name, placed in kinds.items()
        for dtype in (bf16, fp32)
    }
    directions: dict[str, Operation] = {
        "masters into weights": "scatter",
        "weights into masters": "gather",
    }
    for name in ("bitmap", "rows"):
        for what, operation in directions.items():
            constants = kernel.constexprs(operation, *kinds[name], bf16, fp32, True, block=block)
            cases[f"{name}, {what}"] = constants
    warps = launch_tables.num_warps(target)
    return [
        CompileCase(name, kernel.swap_selected_kernel, SIGNATURE, constants, warps)
        for name, constants in cases.items()
    ]


def traffic_cases() -> list[TrafficCase]:
    """Weights of 2**17 entries or more in bf16, of which a tenth is exchanged, in every kind."""
    return [_traffic_case(name, entries) for name, entries in example_entries().items()]


def _traffic_case(name: str, entries: Entries) -> TrafficCase:
    weight = torch.zeros(entries.shape, dtype=torch.bfloat16)
    values = torch.ones(entries.numel, dtype=weight.dtype)
    minimum = 2 * values.nbytes + 2 * entries.numel * weight.itemsize
    minimum += bytes_of_entries(weight, entries) - entries.numel * weight.itemsize
    return TrafficCase(
        name,
        lambda: kernel.launch([(weight, entries, values)]),
        minimum,
        {"values": values} | named_tensors(weight, entries),
    )


def example_entries() -> dict[str, Entries]:
    """A tenth of the elements (enough for a bitmap), a fiftieth (a list), a tenth of the rows.

    And a tenth of the elements in a weight's first and last rows: a list, for the gap's sake.
    """
    shape = (257, 1009)
    at_the_ends = torch.zeros(257, 1)
    at_the_ends[:25] = at_the_ends[-25:] = 0.5
    return {
        "bitmap": _elements(shape, torch.tensor(0.1)),
        "list": _elements(shape, torch.tensor(0.02)),
        "elements in two clusters": _elements(shape, at_the_ends),
        "rows": Entries("rows", (120, 2064), rows=torch.arange(0, 120, 10)),
        "short rows": Entries("rows", (1000, 252), rows=torch.arange(3, 1000, 10)),
        "columns": Entries("rows", (252, 1000), axis=1, rows=torch.arange(3, 1000, 10)),
        "whole": Entries("all", (123, 507)),
    }


def _elements(shape: tuple[int, int], share: Tensor) -> Entries:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(shape, generator=generator) < share
    offsets = torch.nn.functional.pad(chosen.sum(1).cumsum(0), (1, 0))
    positions = chosen.view(-1).nonzero().view(-1).int()
    return Entries("elements", shape, positions=positions, row_offsets=offsets)


def bytes_of_entries(weight: Tensor, entries: Entries) -> int:
    """To write the selected entries once and to read once which ones they are."""
    written = entries.numel * weight.itemsize
    if entries.kind == "rows":
        assert entries.rows is not None
        return written + entries.rows.nbytes
    if entries.kind == "elements":
        assert entries.positions is not None
        (kind, _, _), _ = launch_tables.place(
            weight, entries, entries.numel, launch_tables.block_entries()
        )
        return written + (entries.bitmap() if kind == "bitmap" else entries.positions).nbytes
    return written


def named_tensors(weight: Tensor, entries: Entries) -> dict[str, Tensor]:
    """What the kernel reaches through its tables: the weight, and where its entries are."""
    found = {"weight": weight}
    if entries.kind == "rows":
        assert entries.rows is not None
        found["rows"] = entries.rows
    if entries.kind == "elements":
        assert entries.positions is not None
        found |= {"positions": entries.positions, "bitmap": entries.bitmap()}
        found["spans"] = launch_tables.spans(entries, launch_tables.block_entries())
    return found
