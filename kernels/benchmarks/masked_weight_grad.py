"""The gradient of a weight at its selected entries against a dense gradient that is gathered.

All of them run without recording a graph, as a backward does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_align_kernels.benchmarks.case import OURS, BenchmarkCase, Run, Size, dtype_of, tolerance_of
from lit_align_kernels.benchmarks.masks import random_elements, random_rows
from lit_align_kernels.entries import Entries
from lit_align_kernels.masked_weight_grad import masked_weight_grad
from lit_align_kernels.swap_selected import gather_entries

HEAD = 64  # rows of an attention head
SIZES: dict[Size, tuple[int, int, int]] = {  # tokens, P, Q
    "tiny": (32, 128, 64),
    "small": (512, 576, 576),
    "full": (2048, 1536, 576),
}
GPU_SIZES: dict[Size, tuple[int, int, int]] = {**SIZES, "full": (8192, 4096, 4096)}

Inputs = tuple[Tensor, Tensor]


def cases(
    size: Size, device: torch.device, dtype: torch.dtype | None = None
) -> list[BenchmarkCase]:
    """10 % of elements, of rows, and of heads."""
    on_gpu = device.type == "cuda"
    tokens, rows, columns = (GPU_SIZES if on_gpu else SIZES)[size]
    shape = (rows, columns)
    dtype = dtype or dtype_of(device)
    heads = random_rows(shape, 0.1, device, run=HEAD)
    return [
        _case("10 % of elements", random_elements(shape, 0.1, device), tokens, device, dtype),
        _case("10 % of rows", random_rows(shape, 0.1, device), tokens, device, dtype),
        _case("10 % of heads", heads, tokens, device, dtype),
    ]


def _case(
    name: str, entries: Entries, tokens: int, device: torch.device, dtype: torch.dtype
) -> BenchmarkCase:
    rows, columns = entries.shape

    @torch.no_grad()
    def ours(inputs: Inputs) -> list[Tensor]:
        return [masked_weight_grad(inputs[0], inputs[1], entries)]

    @torch.no_grad()
    def dense(inputs: Inputs) -> list[Tensor]:
        a, b = inputs
        return [gather_entries(a.t() @ b, entries).float()]

    def make(seed: int) -> Inputs:
        generator = torch.Generator(device=device).manual_seed(seed)
        sizes = ((tokens, rows), (tokens, columns))
        a, b = (torch.randn(s, generator=generator, device=device).to(dtype) for s in sizes)
        return a, b

    implementations: dict[str, Run] = {OURS: ours, "torch dense": dense}
    if device.type == "cuda":
        implementations["torch.compile dense"] = torch.compile(dense, dynamic=False)
    needed = rows if entries.kind == "elements" else entries.numel // columns
    return BenchmarkCase(
        operation="masked_weight_grad",
        name=name,
        make=make,
        implementations=implementations,
        expected=lambda inputs: [
            gather_entries(inputs[0].double().t() @ inputs[1].double(), entries)
        ],
        baseline="torch dense",
        flops=2 * tokens * needed * columns,  # of the rows that hold a selected entry
        tolerance=tolerance_of(dtype),
        shapes={"tokens": tokens, "rows": rows, "columns": columns, "selected": entries.numel},
    )
