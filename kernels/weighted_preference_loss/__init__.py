"""Losses of per-token log-probs and their gradients in one pass over the head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_align_kernels import dispatch
from lit_align_kernels.entries import Entries
from lit_align_kernels.token_logprobs import token_logprobs
from lit_align_kernels.token_logprobs.chunks import Chunks, Gradients, default_logits_bytes
from lit_align_kernels.token_logprobs.head import WeightHandle, check_inputs, handle_of
from lit_align_kernels.weighted_preference_loss import one_pass, reference
from lit_align_kernels.weighted_preference_loss.one_pass import ChunkLoss, Settings, TokenNPO

__all__ = ["ChunkLoss", "TokenNPO", "WeightHandle", "weighted_preference_loss"]

IGNORE_INDEX = -100


class _OnePass(torch.autograd.Function):
    """The gradients exist when forward returns; backward multiplies by what arrives."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        selected: Tensor | None,
        bias: Tensor | None,
        targets: Tensor,
        entries: Entries | None,
        settings: Settings,
        max_logits_bytes: int,
        triton: bool,
    ) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_dense, wants_selected, wants_bias = ctx.needs_input_grad[:4]
        handle = WeightHandle(weight, selected, entries, bias)
        with torch.autocast(hidden.device.type, enabled=False):
            chunks = Chunks(hidden, handle, max_logits_bytes, triton)
            gradients = Gradients(chunks, (wants_hidden, wants_dense or wants_selected, wants_bias))
            loss_sum, logps = one_pass.run(chunks, gradients, targets, settings)
        d_weight = gradients.weight
        ctx.gradients = (
            gradients.hidden,
            None if wants_selected else d_weight,
            d_weight if wants_selected else None,
            gradients.bias,
        )
        ctx.mark_non_differentiable(logps)
        return loss_sum, logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("weighted_preference_loss keeps its gradients for one backward only")
        gradients, ctx.gradients = ctx.gradients, None
        # Comparing on a GPU would wait for it.
        if grad.device.type != "cpu" or float(grad) != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad)
        return *gradients, None, None, None, None, None


def weighted_preference_loss(
    hidden: Tensor,
    weight: Tensor | WeightHandle,
    targets: Tensor,
    loss: TokenNPO | ChunkLoss,
    *,
    groups: Sequence[int] | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    max_logits_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """A loss over log softmax(hidden · weightᵀ)[target], each logit formed once for both passes.

    L = Σ_chunks loss(logps of the chunk). All gradients are computed in the forward pass, chunk by
    chunk (as in Liger's fused linear losses, arXiv 2410.10989); `backward` may be called once.
    Where nothing wants a gradient the log-probs alone are computed. In fp16 a loss scale that
    multiplies the result comes too late for gradients that underflow: use `token_logprobs` there.

    Args:
        hidden: (N, D) hidden states that predict the targets; fp32, bf16 or fp16.
        weight: the head's weight (V, D), or the `WeightHandle` of a compact head: then the gradient
            goes to its selected entries.
        targets: (N,) int64 token ids.
        loss: `TokenNPO`, one fused kernel on a GPU; or any callable of (logps (n,) fp32, start,
            stop) that gives the sum of the loss over targets [start, stop). It is differentiated by
            those log-probs and nothing else.
        groups: host-side offsets [0, ..., N], not decreasing: targets [groups[i], groups[i + 1])
            are never split between two calls of `loss` (sequences, pairs). None: one group; every
            token its own for `TokenNPO`. A group whose logits exceed the budget has its logits
            formed twice.
        bias: (V,) or None; a handle brings its own.
        logit_scale: factor on the logits.
        soft_cap: c in c·tanh(logits / c), or None.
        ignore_index: target of tokens with log-prob 0 and no gradient.
        max_logits_bytes: bytes of logits that may exist at once; at least one token's do. None:
            32 MiB, on a GPU 512 MiB.

    Returns:
        The sum of the loss, scalar fp32 with gradient, and the log-probs (N,) fp32 without one.

    Raises:
        ValueError: where shapes or groups do not fit, beta is not > 0, a target lies outside the
            vocabulary (not checked on a GPU: its log-prob is NaN there), or a bias is given beside
            a handle.
    """
    handle = handle_of(weight, bias)
    check_inputs(hidden, handle, targets, ignore_index)
    settings = Settings(
        loss, _checked_groups(loss, groups, len(targets)), logit_scale, soft_cap, ignore_index
    )
    trained = (hidden, handle.weight, handle.selected, handle.bias)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained)):
        return _plain(hidden, handle, targets, settings, max_logits_bytes)
    triton = dispatch.implementation_for("weighted_preference_loss", hidden.device) == "triton"
    if max_logits_bytes is None:
        max_logits_bytes = default_logits_bytes(hidden.device)
    return _OnePass.apply(*trained, targets, handle.entries, settings, max_logits_bytes, triton)


def _plain(
    hidden: Tensor, handle: WeightHandle, targets: Tensor, s: Settings, max_logits_bytes: int | None
) -> tuple[Tensor, Tensor]:
    """Loss and log-probs without gradients."""
    counted = targets != s.ignore_index
    logps = token_logprobs(
        hidden,
        handle,
        targets.where(counted, 0),
        logit_scale=s.logit_scale,
        soft_cap=s.soft_cap,
        max_logits_bytes=max_logits_bytes,
    ).where(counted, 0.0)
    if isinstance(s.loss, TokenNPO):
        weights = s.loss.token_weights.where(counted, 0.0)
        losses, _ = reference.token_npo(logps, s.loss.ref_per_token_logps, weights, s.loss.beta)
        return losses.sum(), logps
    return s.loss(logps, 0, len(logps)).detach(), logps


def _checked_groups(
    loss: TokenNPO | ChunkLoss, groups: Sequence[int] | None, count: int
) -> tuple[int, ...] | None:
    if isinstance(loss, TokenNPO):
        if not loss.beta > 0:
            raise ValueError(f"beta {loss.beta} must be > 0")
        for name in ("ref_per_token_logps", "token_weights"):
            shape = tuple(getattr(loss, name).shape)
            if shape != (count,):
                raise ValueError(f"{name} {shape} do not fit {count} targets")
        return None
    found = (0, count) if groups is None else tuple(groups)
    if not found or found[0] != 0 or found[-1] != count or list(found) != sorted(found):
        raise ValueError(f"groups {found} are no offsets from 0 to {count}")
    return found
