"""Matrix products by the faster library, and in the sizes that libraries are fast at.

On a CPU, fp32: `torch.mm` calls the BLAS that torch was built with. MKL uses no AVX-512 on
processors that are not Intel's; oneDNN, which torch brings too, does, and takes about half the time
there.

On a GPU, 16 bits: where 8 does not divide a size that lies along memory, cuBLAS leaves its fast
kernels, however the rows are padded. On an H100 884 × 4096 · 4096 × 151,665 takes 11.8 ms, and 1.4
ms where the last column is a product of its own.
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


def whole_eights(size: int) -> int:
    """The largest multiple of 8 up to `size`."""
    return size // 8 * 8


def write_by_eights(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Write a · b to `out` (n, m) of their dtype, on a GPU: columns up to a multiple of 8 first."""
    cut = whole_eights(b.shape[1])
    for part in (slice(0, cut), slice(cut, b.shape[1])):
        if part.start < part.stop:
            torch.mm(a, b[:, part], out=out[:, part])


def write_sum_by_eights(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Write a (n, k) · b (k, m) to `out` of their dtype, on a GPU; 8 need not divide k."""
    cut = whole_eights(a.shape[1])
    if 0 < cut < a.shape[1]:  # first the few, which the many are added to before they are rounded
        torch.mm(a[:, cut:], b[cut:], out=out)
        out.addmm_(a[:, :cut], b[:cut])
    else:
        torch.mm(a, b, out=out)


def fp32_product_by_eights(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """Write aᵀ · b to `out` (p, q) fp32, or add it, on a GPU: rows up to a multiple of 8 first.

    Sums are fp32 to the end, also of factors (n, p) and (n, q) in 16 bits.
    """
    if not len(a):
        if not accumulate:
            out.zero_()
        return
    cut = whole_eights(a.shape[1])
    options = {} if a.dtype == torch.float32 else {"out_dtype": torch.float32}
    for part in (slice(0, cut), slice(cut, a.shape[1])):
        if part.start == part.stop:
            continue
        rows, factor = out[part], a[:, part].t()
        if accumulate:
            torch.addmm(rows, factor, b, out=rows, **options)  # type: ignore[call-overload]
        else:
            torch.mm(factor, b, out=rows, **options)  # type: ignore[call-overload]
