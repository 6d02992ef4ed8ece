"""The gradient of a weight at its selected entries against a dense gradient that is gathered."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_align_kernels.benchmarks.case import OURS, BenchmarkCase, Run, Size, tolerance_of
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


def cases(size: Size, device: torch.device) -> list[BenchmarkCase]:
    """10 % of elements, of rows, and of heads."""
    on_gpu = device.type == "cuda"
    tokens, rows, columns = (GPU_SIZES if on_gpu else SIZES)[size]
    shape = (rows, columns)
    return [
        _case("10 % of elements", random_elements(shape, 0.1, device), tokens, device),
        _case("10 % of rows", random_rows(shape, 0.1, device), tokens, device),
        _case("10 % of heads", random_rows(shape, 0.1, device, run=HEAD), tokens, device),
    ]


def _case(name: str, entries: Entries, tokens: int, device: torch.device) -> BenchmarkCase:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows, columns = entries.shape

    def dense(inputs: Inputs) -> list[Tensor]:
        a, b = inputs
        return [gather_entries(a.t() @ b, entries).float()]

    def make(seed: int) -> Inputs:
        generator = torch.Generator(device=device).manual_seed(seed)
        sizes = ((tokens, rows), (tokens, columns))
        a, b = (torch.randn(s, generator=generator, device=device).to(dtype) for s in sizes)
        return a, b

    implementations: dict[str, Run] = {
        OURS: lambda inputs: [masked_weight_grad(inputs[0], inputs[1], entries)],
        "torch dense": dense,
    }
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
        tolerance=tolerance_of(torch.float32) * 10 if dtype == torch.float32 else 1e-3,
        shapes={"tokens": tokens, "rows": rows, "columns": columns, "selected": entries.numel},
    )
