"""Per-token log-probs of targets, without ever holding all logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_align_kernels import dispatch
from lit_align_kernels.entries import Entries
from lit_align_kernels.token_logprobs import reference
from lit_align_kernels.token_logprobs.reference import HeadSettings, TokenStatistics

__all__ = ["TokenStatistics", "WeightHandle", "token_logprobs", "token_logprobs_with_statistics"]

DEFAULT_LOGITS_BYTES = 16 << 20
MIN_BLOCK = 256


@dataclasses.dataclass
class WeightHandle:
    """A head's weight together with the trainable entries that stand for it.

    Attributes:
        weight: (V, D), frozen.
        selected: (M,) fp32, the Parameter that receives the gradient.
        entries: which entries of the weight `selected` holds.
        bias: (V,) or None.
    """

    weight: Tensor
    selected: Tensor | None = None
    entries: Entries | None = None
    bias: Tensor | None = None


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        selected: Tensor | None,
        bias: Tensor | None,
        targets: Tensor,
        entries: Entries | None,
        settings: HeadSettings,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            logps, logsumexp = reference.forward(hidden, weight, bias, targets, settings)
        ctx.save_for_backward(hidden, weight, bias, targets, logsumexp)
        ctx.entries, ctx.settings = entries, settings
        ctx.mark_non_differentiable(logsumexp)
        return logps, logsumexp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, logsumexp = ctx.saved_tensors
        wants_hidden, wants_dense, wants_selected, wants_bias = ctx.needs_input_grad[:4]
        with torch.autocast(hidden.device.type, enabled=False):
            d_hidden, d_weight, d_bias = reference.backward(
                grad.float(),
                logsumexp,
                hidden,
                weight,
                bias,
                targets,
                ctx.settings,
                ctx.entries if wants_selected else None,
                (wants_hidden, wants_dense or wants_selected, wants_bias),
            )
        if wants_selected:
            return d_hidden, None, d_weight, d_bias, None, None, None
        return d_hidden, d_weight, None, d_bias, None, None, None


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} does not fit head {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} does not fit head {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} do not fit hidden {tuple(hidden.shape)}")
    if targets.device.type == "cpu" and targets.numel():
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(f"targets in [{low}, {high}], the vocabulary has {weight.shape[0]}")


def _apply(
    hidden: Tensor,
    weight: Tensor | WeightHandle,
    targets: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    soft_cap: float | None,
    max_logits_bytes: int,
) -> tuple[Tensor, Tensor, WeightHandle, HeadSettings]:
    if isinstance(weight, WeightHandle) and bias is not None:
        raise ValueError("a WeightHandle brings its own bias: give none beside it")
    handle = weight if isinstance(weight, WeightHandle) else WeightHandle(weight, bias=bias)
    _check(hidden, handle.weight, handle.bias, targets)
    dispatch.implementation_for("token_logprobs", hidden.device)
    block = max(MIN_BLOCK, max_logits_bytes // (4 * max(1, *hidden.shape)))
    settings = HeadSettings(logit_scale, soft_cap, min(block, handle.weight.shape[0]))
    logps, logsumexp = _TokenLogprobs.apply(
        hidden, handle.weight, handle.selected, handle.bias, targets, handle.entries, settings
    )
    return logps, logsumexp, handle, settings


def token_logprobs(
    hidden: Tensor,
    weight: Tensor | WeightHandle,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
    max_logits_bytes: int = DEFAULT_LOGITS_BYTES,
) -> Tensor:
    """Log softmax(hidden · weightᵀ)[target] for every target.

    Args:
        hidden: (N, D) hidden states that predict the targets; fp32, bf16 or fp16.
        weight: the head's weight (V, D), or the `WeightHandle` of a compact head: then the gradient
            goes to its selected entries.
        targets: (N,) int64 token ids.
        bias: (V,) or None; a handle brings its own.
        logit_scale: factor on the logits.
        soft_cap: c in c·tanh(logits / c), or None.
        max_logits_bytes: bytes of logits (and of the weight's gradient, where entries train) that
            may exist at once; at least 256 of the vocabulary are taken together.

    Returns:
        (N,) fp32, accumulated in fp32. N may be 0.

    Raises:
        ValueError: where shapes do not fit, a target lies outside the vocabulary (not checked on a
            GPU: its log-prob is NaN there), or a bias is given beside a handle.
    """
    return _apply(hidden, weight, targets, bias, logit_scale, soft_cap, max_logits_bytes)[0]


def token_logprobs_with_statistics(
    hidden: Tensor,
    weight: Tensor | WeightHandle,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
    max_logits_bytes: int = DEFAULT_LOGITS_BYTES,
) -> tuple[Tensor, TokenStatistics]:
    """`token_logprobs`, and what is worth logging of the distributions (one more pass)."""
    logps, logsumexp, handle, settings = _apply(
        hidden, weight, targets, bias, logit_scale, soft_cap, max_logits_bytes
    )
    return logps, reference.statistics(
        hidden.detach(), handle.weight, handle.bias, targets, logsumexp, settings
    )
