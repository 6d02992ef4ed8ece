"""What this device can do at best, measured here: copies and matrix products."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lit_align_kernels.benchmarks.timing import median_ms, times_ms
from lit_align_kernels.products import product


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Best rates of this device in this run, of one large problem each.

    No bound by nature: a problem that fits into a cache can be copied faster, and another shape may
    suit a library of products better.

    Attributes:
        copy_gb_per_s: 10⁹ bytes read and written a second by a large copy.
        matmul_tflops: 10¹² multiply-adds ×2 a second by a large square matrix product, by the
            faster of torch's libraries (on a CPU: its BLAS, and oneDNN where `products` uses it).
    """

    copy_gb_per_s: float
    matmul_tflops: float


def measure_ceilings(device: torch.device, dtype: torch.dtype, tiny: bool = False) -> Ceilings:
    """Copy and multiply large tensors of `dtype`."""
    numel = (1 << 20) if tiny else (1 << 28 if device.type == "cuda" else 1 << 25)
    side = 256 if tiny else (8192 if device.type == "cuda" else 1536)
    source = torch.ones(numel, device=device)
    target = torch.empty_like(source)
    left = torch.randn(side, side, device=device).to(dtype)

    @torch.no_grad()
    def by_products(_: None) -> Tensor:
        return product(left, left)

    functions = {
        "copy": lambda _: target.copy_(source),
        "matmul": lambda _: left @ left,
        "product": by_products,
    }
    timed = times_ms(functions, [None], device, rounds=10)
    fastest_ms = min(median_ms(timed["matmul"]), median_ms(timed["product"]))
    return Ceilings(
        copy_gb_per_s=2 * source.nbytes / median_ms(timed["copy"]) / 1e6,
        matmul_tflops=2 * side**3 / fastest_ms / 1e9,
    )
