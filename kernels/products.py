"""Matrix products in fp32 on a CPU, by oneDNN where it is the faster library.

`torch.mm` calls the BLAS that torch was built with. MKL uses no AVX-512 on processors that are not
Intel's; oneDNN, which torch brings too, does, and takes about half the time there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def has_faster_products() -> bool:
    """Whether oneDNN is there and the faster library for fp32 products on this processor."""
    return bool(
        torch.backends.mkldnn.enabled
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """The product by oneDNN, where it can take these factors and no graph is being recorded."""
    if (
        torch.compiler.is_compiling()
        or a.device.type != "cpu"
        or not a.dtype == b.dtype == torch.float32
        or not a.numel()
        or not b.numel()
        or torch.is_grad_enabled()
        or not has_faster_products()
    ):
        return None
    found = torch.ops.mkldnn._linear_pointwise(a.flatten(0, -2), b.t(), bias, "none", [], "")
    # As a view, an autograd function's result could not be changed in place.
    return torch.ops.aten._unsafe_view(found, (*a.shape[:-1], b.shape[1]))


def product(a: Tensor, b: Tensor) -> Tensor:
    """The product of a (..., k) and b (k, m)."""
    found = _onednn(a, b)
    return a @ b if found is None else found


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product x Wᵀ + b of x (..., k) and weight (m, k), inside an autograd function."""
    autocast = torch.is_autocast_enabled(x.device.type)
    found = None if autocast else _onednn(x, weight.t(), bias)
    return F.linear(x, weight, bias) if found is None else found


def write_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Write a · b to `out` (n, m), of any strides."""
    found = _onednn(a, b)
    if found is None and a.dtype == b.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b if found is None else found)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a · b to `out` (n, m), of any strides."""
    found = _onednn(a, b)
    if found is None and a.dtype == b.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out += a @ b if found is None else found
