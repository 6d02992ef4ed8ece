"""Module classes whose forward uses the frozen weight and whose backward fills `selected`.

Shapes: x (..., in), y (..., out), weight (out, in) in nn.Linear and (in, out) in GPT-2's Conv1D.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_align.compact import graphs
from lit_align.compact.fast_products import FastLinear, linear_kind, takes_fast_products
from lit_align.compact.state import (
    compact_state,
    live_modules,
    module_links,
    read_back,
    write_through,
)
from lit_align.shards import is_sharded
from lit_align_kernels.entries import Entries
from lit_align_kernels.masked_weight_grad import masked_weight_grad
from lit_align_kernels.products import linear, product
from lit_align_kernels.swap_selected import gather_entries


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b; the gradient of W exists only at its selected entries."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        selected: Tensor,
        entries: Entries,
        transposed: bool,
        fast: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.entries, ctx.transposed = entries, transposed
        ctx.bias_dtype = None if bias is None else bias.dtype
        return (linear if fast else F.linear)(x, weight.t() if transposed else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        weight = weight.to(grad.dtype)  # under autocast the products run in the output's dtype
        grad_x = grad_bias = grad_selected = None
        if ctx.needs_input_grad[0]:
            grad_x = product(grad, weight.t() if ctx.transposed else weight).to(x.dtype)
        flat = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[2]:
            grad_bias = flat.sum(0).to(ctx.bias_dtype)
        if ctx.needs_input_grad[3]:
            flat_x = x.reshape(-1, x.shape[-1]).to(grad.dtype)
            a, b = (flat_x, flat) if ctx.transposed else (flat, flat_x)
            grad_selected = masked_weight_grad(a, b, ctx.entries)
        return grad_x, None, grad_bias, grad_selected, None, None, None


class _Embedding(torch.autograd.Function):
    """Rows of the weight by token id; selected entries of rows that occur get a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        input_ids: Tensor,
        weight: Tensor,
        padding_idx: int | None,
        selected: Tensor,
        entries: Entries,
    ) -> Tensor:
        ctx.save_for_backward(input_ids)
        ctx.entries, ctx.padding_idx = entries, padding_idx
        return F.embedding(input_ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (input_ids,) = ctx.saved_tensors
        ids, grad = input_ids.reshape(-1), grad.reshape(-1, grad.shape[-1]).float()
        if ctx.padding_idx is not None:
            keep = ids != ctx.padding_idx
            ids, grad = ids[keep], grad[keep]
        return None, None, None, _embedding_gradient(ids, grad, ctx.entries), None


def _embedding_gradient(ids: Tensor, grad: Tensor, entries: Entries) -> Tensor:
    """Selected entries of the embedding's gradient: ids (N,), grad (N, D) → (M,) fp32."""
    if entries.kind == "all":
        out = torch.zeros(entries.shape, dtype=torch.float32, device=grad.device)
        return out.index_add_(0, ids, grad).reshape(-1)
    if entries.kind == "rows":
        assert entries.rows is not None
        slot = torch.searchsorted(entries.rows, ids).clamp_(max=entries.rows.numel() - 1)
        keep = entries.rows[slot] == ids
        out = grad.new_zeros(entries.rows.numel(), grad.shape[1])
        return out.index_add_(0, slot[keep], grad[keep]).reshape(-1)
    assert entries.positions is not None and entries.row_offsets is not None
    tokens, index = ids.unique(return_inverse=True)
    per_token = grad.new_zeros(tokens.numel(), grad.shape[1]).index_add_(0, index, grad)
    first = entries.row_offsets[tokens]
    counts = entries.row_offsets[tokens + 1] - first
    owner = torch.repeat_interleave(counts)
    slots = torch.arange(owner.numel(), device=ids.device) - (counts.cumsum(0) - counts)[owner]
    slots += first[owner]
    columns = entries.positions[slots].long() - tokens[owner] * grad.shape[1]
    out = torch.zeros(entries.numel, dtype=torch.float32, device=grad.device)
    out[slots] = per_token[owner, columns]
    return out


class _Gather(torch.autograd.Function):
    """The weight itself; its dense gradient is gathered into `selected` and freed."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, selected: Tensor, entries: Entries) -> Tensor:
        ctx.entries = entries
        return weight.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, gather_entries(grad.contiguous(), ctx.entries).float(), None


class CompactModule(nn.Module):
    """Mixin of every module that holds a partly selected parameter."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and be found by the optimisers' hook (deepcopy comes through here)."""
        super().__setstate__(state)
        live_modules.add(self)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
        """Cast and move the weight as usual; `selected` moves but is never cast."""
        found = list(module_links(self))
        attributes = [link.state.trainable for link in found if link.state.trainable]
        masters = {name: self._parameters.pop(name) for name in attributes}
        super()._apply(fn, recurse)
        self._parameters.update(masters)
        for link in found:
            device = link.weight.device
            link.state.move_to(device, link.weight.dtype)
            if not link.is_whole and link.selected.device != device:
                link.selected.data = link.selected.data.to(device)
                if link.selected.grad is not None:
                    link.selected.grad = link.selected.grad.to(device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Write the base's keys alone: the weight holds the trained values already."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for state in compact_state(self).values():
            if state.trainable is not None:
                destination.pop(prefix + state.trainable, None)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        metadata: Any,
        strict: bool,
        missing_keys: Any,
        *rest: Any,
    ) -> None:
        """Load weights or selected entries; whichever came decides the other."""
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *rest)
        links = {prefix + k.state.trainable: k for k in module_links(self) if k.state.trainable}
        write_through(link for key, link in links.items() if key in state_dict)
        read_back(link for key, link in links.items() if key not in state_dict)
        missing_keys[:] = [key for key in missing_keys if key not in links or key in state_dict]


class CompactLinear(CompactModule):
    """nn.Linear or Conv1D with a partly selected weight."""

    _is_transposed = False

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        weight, state = self._parameters["weight"], compact_state(self)["weight"]
        assert state.trainable is not None and weight is not None
        y = _Linear.apply(
            x,
            weight,
            self.bias,
            self._parameters[state.trainable],
            state.entries,
            self._is_transposed,
            isinstance(self, FastLinear) and takes_fast_products(x, weight),
        )
        return graphs.track(y, self)


class CompactConv1D(CompactLinear):
    """GPT-2's Conv1D, whose weight is (in, out)."""

    _is_transposed = True


class CompactEmbedding(CompactModule):
    """nn.Embedding with a partly selected weight."""

    padding_idx: int | None

    def forward(self, input_ids: Tensor) -> Tensor:
        """(...) int64 → (..., D)."""
        weight, state = self._parameters["weight"], compact_state(self)["weight"]
        assert state.trainable is not None
        y = _Embedding.apply(
            input_ids, weight, self.padding_idx, self._parameters[state.trainable], state.entries
        )
        return graphs.track(y, self)


def _passes_through(parameter: str) -> property:
    """A property that hands out the frozen parameter with the gradient led into its entries."""

    def fget(self: nn.Module) -> Tensor:
        weight, state = self._parameters[parameter], compact_state(self).get(parameter)
        if state is None or state.trainable is None or not torch.is_grad_enabled():
            return weight  # type: ignore[return-value]
        if weight is not None and is_sharded(weight):  # FSDP2 looks at it; nobody computes with it
            return weight
        y = _Gather.apply(weight, self._parameters[state.trainable], state.entries)
        return graphs.track(y, self)

    def fset(self: nn.Module, value: Tensor) -> None:
        nn.Module.__setattr__(self, parameter, value)

    return property(fget, fset)


def _fast_class(module: nn.Module) -> type[CompactModule] | None:
    """The fast path for this module, where its forward is the plain one."""
    forward = type(module).forward
    if kind := linear_kind(module):
        return CompactLinear if kind == "linear" else CompactConv1D
    if forward is nn.Embedding.forward and isinstance(module, nn.Embedding):
        plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        plain = plain and compact_state(module)["weight"].entries.axis == 0
        return CompactEmbedding if plain else None
    return None


@functools.cache
def compact_class(
    original: type[nn.Module], fast: type[CompactModule] | None, through: tuple[str, ...]
) -> type[nn.Module]:
    """A subclass of `original`; cached, so that equal modules share one class (torch.compile)."""
    bases = (fast or CompactModule, original)
    members: dict[str, Any] = {name: _passes_through(name) for name in through}
    members["__module__"] = original.__module__
    return type(f"Compact{original.__name__}", bases, members)


def make_compact(module: nn.Module) -> None:
    """Change the class of a module whose compact state is set."""
    parts = [n for n, s in compact_state(module).items() if s.trainable is not None]
    if not parts:
        return
    original: Any = type(module)
    fast: Any = _fast_class(module) if "weight" in parts else None
    # The fast forwards do not read `weight` themselves; others' code may (nn.MultiheadAttention).
    module.__class__ = compact_class(original, fast, tuple(parts))
    live_modules.add(module)
