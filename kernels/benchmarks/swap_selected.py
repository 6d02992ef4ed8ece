"""Exchange selected entries with kept values: one launch against gather, scatter, copy."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_align_kernels.benchmarks.case import OURS, BenchmarkCase, Run, Size, dtype_of
from lit_align_kernels.benchmarks.masked_adamw import SHAPES
from lit_align_kernels.benchmarks.masks import selections
from lit_align_kernels.entries import Entries
from lit_align_kernels.swap_selected import Swap, swap_selected_


def cases(
    size: Size, device: torch.device, dtype: torch.dtype | None = None
) -> list[BenchmarkCase]:
    """10 % of elements, and 10 % of rows."""
    dtype = dtype or dtype_of(device)
    return [
        _case(name, size, device, dtype, entries)
        for name, entries in selections(SHAPES[size], device).items()
    ]


def _case(
    name: str,
    size: Size,
    device: torch.device,
    dtype: torch.dtype,
    entries: Mapping[tuple[int, ...], Entries],
) -> BenchmarkCase:
    selected = sum(entries[s].numel for s in SHAPES[size])
    implementations: dict[str, Run] = {OURS: _ours, "torch": _torch}
    if device.type == "cuda":
        implementations["torch.compile"] = torch.compile(_torch, dynamic=False)
    return BenchmarkCase(
        operation="swap_selected",
        name=name,
        make=lambda seed: _inputs(size, dtype, entries, device, seed),
        implementations=implementations,
        expected=_torch,
        baseline="torch",
        minimum_bytes=4 * selected * dtype.itemsize,  # both sides read and written
        tolerance=0.0,
        shapes={"selected": selected},
    )


def _inputs(
    size: Size,
    dtype: torch.dtype,
    entries: Mapping[tuple[int, ...], Entries],
    device: torch.device,
    seed: int,
) -> list[Swap]:
    generator = torch.Generator(device=device).manual_seed(seed)
    swaps = []
    for shape in SHAPES[size]:
        weight = torch.randn(shape, generator=generator, device=device).to(dtype)
        count = entries[shape].numel
        values = torch.randn(count, generator=generator, device=device).to(dtype)
        swaps.append((weight, entries[shape], values))
    return swaps


def _results(swaps: list[Swap]) -> list[Tensor]:
    return [t for weight, _, values in swaps for t in (weight, values)]


def _ours(swaps: list[Swap]) -> list[Tensor]:
    swap_selected_(swaps)
    return _results(swaps)


def _torch(swaps: list[Swap]) -> list[Tensor]:
    """Indexing as one would write it by hand."""
    for weight, entries, values in swaps:
        if entries.kind == "rows":
            kept = weight[entries.rows]
            weight[entries.rows] = values.view_as(kept)
        else:
            assert entries.positions is not None
            flat, at = weight.view(-1), entries.positions.long()
            kept = flat[at]
            flat[at] = values
        values.copy_(kept.reshape(-1))
    return _results(swaps)
