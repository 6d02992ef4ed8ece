"""Module classes whose forward applies a frozen change under a gate: θ_0 + γ·Δθ (ILA)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_align.compact.fast_products import linear_kind
from lit_align.compact.gated_products import gated_product, gated_weight
from lit_align.compact.low_rank import LowRank
from lit_align.compact.restrict import head_handle
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
        assert weight is not None
        if isinstance(change, Tensor):
            return hidden, WeightHandle(gated_weight(weight, change, gate), bias=bias)
        a, b = change.a.to(hidden.dtype), change.b
        h = F.linear(hidden, a) * (gate * change.scale).to(hidden.dtype)
        joined = torch.cat([weight.detach(), b], dim=1)
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
        bias = self._parameters.get("bias")
        assert weight is not None
        return gated_product(x, weight, bias, change, self.gate(), self._is_transposed)


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
        return weight if self.is_closed() else gated_weight(weight, change, self.gate())


def gate_of(module: nn.Module) -> Gate:
    """The gate of a gated module."""
    return module.__dict__[GATE]


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module's forward is that of nn.Linear or Conv1D."""
    return linear_kind(module) is not None


def _gated_base(module: nn.Module) -> type[GatedModule]:
    kind = linear_kind(module)
    if kind is not None:
        return GatedLinear if kind == "linear" else GatedConv1D
    if type(module).forward is nn.Embedding.forward and isinstance(module, nn.Embedding):
        return GatedEmbedding if module.max_norm is None else GatedWeight
    return GatedWeight


@functools.cache
def _gated_class(original: type[nn.Module], base: type[GatedModule]) -> type[nn.Module]:
    """A subclass of `original`; cached, so that equal modules share one class (torch.compile)."""
    return type(f"Gated{original.__name__}", (base, original), {"__module__": original.__module__})


def make_gated(module: nn.Module, gate: Gate, score: nn.Parameter) -> None:
    """Change the class of a module, whose weight stands under a gate from now on."""
    original, base = cast(Any, type(module)), cast(Any, _gated_base(module))
    module.__class__ = _gated_class(original, base)
    module.__dict__[GATE] = gate
    module.register_parameter(SCORE, score)
