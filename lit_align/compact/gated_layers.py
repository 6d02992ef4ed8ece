"""Module classes whose forward applies a frozen change under a gate: θ_0 + γ·Δθ (ILA).

Shapes: x (..., in), y (..., out), weight and change (out, in) in nn.Linear and (in, out) in GPT-2's
Conv1D; T = product of the leading dimensions. γ is a scalar, the only thing that gets a gradient
beside x.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from lit_align.compact.change import LowRank
from lit_align.compact.restrict import head_handle
from lit_align_kernels.products import add_product, product
from lit_align_kernels.token_logprobs import WeightHandle

GATE = "_gate"  # attribute of a module: its Gate
SCORE = "score"  # attribute of a module: the trainable Parameter


@dataclasses.dataclass
class Switch:
    """One for all gates of a model: a value that stands in for every σ(s), or None."""

    value: float | None = None


@dataclasses.dataclass
class Gate:
    """What a gated module knows of its change; shared by all uses of a tied weight.

    Attributes:
        name: of the layer.
        change: of its weight.
        switch: see `Switch`.
    """

    name: str
    change: LowRank | Tensor
    switch: Switch

    def move_to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Take the change to the weight's device and dtype."""
        change = self.change
        if isinstance(change, Tensor):
            self.change = change.to(device, dtype)
        else:
            a, b = change.a.to(device, dtype), change.b.to(device, dtype)
            self.change = LowRank(a, b, change.scale)


class _Merged(torch.autograd.Function):
    """W + γΔ for code that takes a weight; dγ = <dW, Δ>."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, change: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(change)
        return merged(weight, change, gate)

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
        both = merged(weight, change, gate)
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
        add_product(y.view(-1, y.shape[-1]), h * (gate * change.scale), change.b.to(y.dtype).t())
        return y

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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X Wᵀ + b inside an autograd function, by the faster library where autocast leaves it fp32."""
    if torch.is_autocast_enabled(x.device.type) or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    y = product(x, weight.t())
    return y if bias is None else y.add_(bias)


def merged(weight: Tensor, change: Tensor, gate: Tensor) -> Tensor:
    """W + γΔ, a new tensor."""
    return torch.addcmul(weight, change, gate.to(weight.dtype))


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> in fp32, scalar."""
    return torch.dot(a.reshape(-1).float(), b.reshape(-1).float())


class GatedModule(nn.Module):
    """Mixin of every module whose weight stands under a gate."""

    def gate(self) -> Tensor:
        """γ = σ(s), scalar fp32, or the value that the switch says."""
        score, value = self._parameters[SCORE], gate_of(self).switch.value
        assert score is not None
        return torch.sigmoid(score) if value is None else torch.full_like(score, value)

    def is_closed(self) -> bool:
        """Whether the base alone is asked for."""
        return gate_of(self).switch.value == 0.0

    def head_inputs(self, hidden: Tensor) -> tuple[Tensor, WeightHandle]:
        """Hidden states and weight whose product is this head's, the change included.

        A low-rank change adds r columns to both; a full one is merged. Either is a copy of the
        head's weight that lives for this call's use alone.
        """
        if self.is_closed():
            return hidden, head_handle(self)
        change, gate, weight = gate_of(self).change, self.gate(), self._parameters["weight"]
        bias = self._parameters.get("bias")
        if isinstance(change, Tensor):
            return hidden, WeightHandle(_Merged.apply(weight, change, gate), bias=bias)
        a, b = change.a.to(hidden.dtype), change.b
        h = F.linear(hidden, a) * (gate * change.scale).to(hidden.dtype)
        joined = torch.cat([weight.detach(), b], dim=1)  # type: ignore[union-attr]
        return torch.cat([hidden, h.to(hidden.dtype)], dim=1), WeightHandle(joined, bias=bias)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
        """Cast and move the weight as usual; the change follows it, the score is never cast."""
        score = self._parameters.pop(SCORE)
        super()._apply(fn, recurse)
        self._parameters[SCORE] = score
        weight = self._parameters["weight"]
        assert weight is not None and score is not None
        gate_of(self).move_to(weight.device, weight.dtype)
        score.data = score.data.to(weight.device)
        if score.grad is not None:
            score.grad = score.grad.to(weight.device)
        return self


class GatedLinear(GatedModule):
    """nn.Linear or Conv1D under a gate."""

    _is_transposed = False

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        if self.is_closed():
            return super().forward(x)
        change, weight = gate_of(self).change, self._parameters["weight"]
        function = _FullChange if isinstance(change, Tensor) else _LowRankChange
        return function.apply(x, weight, self.bias, change, self.gate(), self._is_transposed)


class GatedConv1D(GatedLinear):
    """GPT-2's Conv1D, whose weight is (in, out)."""

    _is_transposed = True


class GatedEmbedding(GatedModule):
    """nn.Embedding whose weight is a gated head's."""

    padding_idx: int | None

    def forward(self, input_ids: Tensor) -> Tensor:
        """(...) int64 → (..., D)."""
        y = super().forward(input_ids)
        if self.is_closed():
            return y
        change = gate_of(self).change
        assert isinstance(change, Tensor)
        return y + self.gate().to(y.dtype) * F.embedding(input_ids, change)


class GatedWeight(GatedModule):
    """Any other module: its own code reads the merged weight."""

    @property
    def weight(self) -> Tensor:
        """W + γΔ."""
        weight, change = self._parameters["weight"], gate_of(self).change
        assert isinstance(change, Tensor) and weight is not None
        return weight if self.is_closed() else _Merged.apply(weight, change, self.gate())


def gate_of(module: nn.Module) -> Gate:
    """The gate of a gated module."""
    return module.__dict__[GATE]


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module's forward is that of nn.Linear or Conv1D."""
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def _gated_base(module: nn.Module) -> type[GatedModule]:
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return GatedLinear
    if forward is Conv1D.forward:
        return GatedConv1D
    if forward is nn.Embedding.forward and isinstance(module, nn.Embedding):
        return GatedEmbedding if module.max_norm is None else GatedWeight
    return GatedWeight


@functools.cache
def _gated_class(original: type[nn.Module], base: type[GatedModule]) -> type[nn.Module]:
    """A subclass of `original`; cached, so that equal modules share one class (torch.compile)."""
    return type(f"Gated{original.__name__}", (base, original), {"__module__": original.__module__})


def make_gated(module: nn.Module, gate: Gate, score: nn.Parameter) -> None:
    """Change the class of a module, whose weight stands under a gate from now on."""
    module.__class__ = _gated_class(type(module), _gated_base(module))
    module.__dict__[GATE] = gate
    module.register_parameter(SCORE, score)
