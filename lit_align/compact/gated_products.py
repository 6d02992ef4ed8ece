"""The products of gated layers: autograd functions of x and γ; everything else is frozen.

Shapes: x (..., in), y (..., out), weight and change (out, in) in nn.Linear and (in, out) in GPT-2's
Conv1D (`transposed`); γ is a scalar.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_align.compact.low_rank import LowRank
from lit_align_kernels.products import add_product, linear, product


def gated_weight(weight: Tensor, change: Tensor, gate: Tensor) -> Tensor:
    """W + γΔ as a tensor of its own, for code that takes a weight; dγ = <dW, Δ>."""
    return _Merged.apply(weight, change, gate)


def gated_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    change: LowRank | Tensor,
    gate: Tensor,
    transposed: bool = False,
) -> Tensor:
    """The product x (W + γΔ)ᵀ + b, with gradients for x and γ alone.

    A full Δ costs a third product beside the two of a frozen layer, a low-rank one its own two thin
    products in each direction.
    """
    function = _FullChange if isinstance(change, Tensor) else _LowRankChange
    return function.apply(x, weight, bias, change, gate, transposed)


class _Merged(torch.autograd.Function):
    """See `gated_weight`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, change: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(change)
        return _merged(weight, change, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (change,) = ctx.saved_tensors
        return None, None, _inner(grad, change)


class _FullChange(torch.autograd.Function):
    """y = x (W + γΔ)ᵀ + b; the merged weight exists during the product alone.

    Backward: v = dY Δ, dγ = <v, x>, dX = dY W + γ v: three products instead of two.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        change: Tensor,
        gate: Tensor,
        transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, change, gate)
        ctx.transposed = transposed
        both = _merged(weight, change, gate)
        return linear(x, both.t() if transposed else both, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, change, gate = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        weight, change = weight.to(grad.dtype), change.to(grad.dtype)
        if ctx.transposed:
            weight, change = weight.t(), change.t()
        v = product(flat, change)
        grad_gate = _inner(v, x.reshape(v.shape))
        grad_x = None
        if ctx.needs_input_grad[0]:
            v.mul_(gate)
            add_product(v, flat, weight)
            grad_x = v.view(x.shape).to(x.dtype)
        return grad_x, None, None, None, grad_gate, None


class _LowRankChange(torch.autograd.Function):
    """y = x Wᵀ + b + γ·scale·h Bᵀ with h = x Aᵀ; dγ = scale·<dY B, h>. Of x nothing is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        change: LowRank,
        gate: Tensor,
        transposed: bool,
    ) -> Tensor:
        y = linear(x, weight.t() if transposed else weight, bias)
        h = linear(x, change.a).reshape(-1, change.a.shape[0])
        ctx.save_for_backward(h, weight, change.a, change.b, gate)
        ctx.scale, ctx.transposed, ctx.x = change.scale, transposed, (x.shape, x.dtype)
        # Not in place: selective checkpointing keeps both products.
        change_y = product(h * (gate * change.scale), change.b.to(y.dtype).t())
        return y + change_y.view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, a, b, gate = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_h = product(flat, b.to(grad.dtype))
        grad_gate = _inner(grad_h, h) * ctx.scale
        grad_x = None
        if ctx.needs_input_grad[0]:
            weight = weight.to(grad.dtype)
            grad_x = product(flat, weight.t() if ctx.transposed else weight)
            add_product(grad_x, grad_h * (gate * ctx.scale), a.to(grad.dtype))
            shape, dtype = ctx.x
            grad_x = grad_x.view(shape).to(dtype)
        return grad_x, None, None, None, grad_gate, None


def _merged(weight: Tensor, change: Tensor, gate: Tensor) -> Tensor:
    """W + γΔ, a new tensor."""
    return torch.addcmul(weight, change, gate.to(weight.dtype))


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> in fp32, scalar."""
    return torch.dot(a.reshape(-1).float(), b.reshape(-1).float())
