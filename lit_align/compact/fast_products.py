"""Plain linear layers whose products, forward and backward, take the faster library on a CPU.

`nn.Linear` calls the BLAS that torch was built with. `lit_align_kernels.products` takes oneDNN
where that is faster, which halves the time of a step on processors that MKL leaves AVX-512 unused
on; results agree to rounding.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from lit_align_kernels.products import has_faster_products, linear, product


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b with a dense gradient of W where it trains."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.transposed = transposed
        return linear(x, weight.t() if transposed else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = product(grad, weight.t() if ctx.transposed else weight)
        if ctx.needs_input_grad[1]:
            flat_x = x.reshape(-1, x.shape[-1])
            a, b = (flat_x, flat) if ctx.transposed else (flat, flat_x)
            grad_weight = product(a.t(), b)
        if ctx.needs_input_grad[2]:
            grad_bias = flat.sum(0)
        return grad_x, grad_weight, grad_bias, None


class FastLinear(nn.Module):
    """Mixin of nn.Linear and Conv1D."""

    weight: Tensor
    bias: Tensor | None
    _is_transposed = False

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        if not takes_fast_products(x, self.weight):
            return super().forward(x)  # type: ignore[misc]
        return _Linear.apply(x, self.weight, self.bias, self._is_transposed)


class FastConv1D(FastLinear):
    """GPT-2's Conv1D, whose weight is (in, out)."""

    _is_transposed = True


def takes_fast_products(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of these two is one that the faster library takes, and gains by."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > x.shape[-1]  # a single row, as in generation, gains nothing
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def linear_kind(module: nn.Module) -> Literal["linear", "conv1d"] | None:
    """What a module is whose forward is the plain product x Wᵀ + b: nn.Linear, Conv1D or None."""
    forward = type(module).forward
    if forward is FastLinear.forward:
        return "conv1d" if isinstance(module, FastConv1D) else "linear"
    if forward is nn.Linear.forward:
        return "linear"
    return "conv1d" if forward is Conv1D.forward else None


@functools.cache
def _fast_class(original: type[nn.Module], fast: type[FastLinear]) -> type[nn.Module]:
    """A subclass of `original`; cached, so that equal modules share one class."""
    name = f"Fast{original.__name__}"
    return type(name, (fast, original), {"__module__": original.__module__})


def use_fast_products(model: nn.Module) -> nn.Module:
    """Let the plain linear layers of a model on the CPU take the faster products, in place.

    Where there is no faster library, or the model is elsewhere or not in fp32, nothing changes.
    Call it before `restrict`, `gate` and `add_adapters`, which keep what they find.

    Args:
        model: any nn.Module.

    Returns:
        The model itself.
    """
    if not has_faster_products():
        return model
    for module in model.modules():
        kind = None if isinstance(module, FastLinear) else linear_kind(module)
        if kind is not None:
            original: Any = type(module)
            module.__class__ = _fast_class(original, FastLinear if kind == "linear" else FastConv1D)
    return model
