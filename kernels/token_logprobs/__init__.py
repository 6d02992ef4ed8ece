"""Per-token log-probs of targets, without ever holding all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_align_kernels import dispatch
from lit_align_kernels.entries import Entries
from lit_align_kernels.token_logprobs import chunks, vocabulary_blocks
from lit_align_kernels.token_logprobs.head import WeightHandle, check_inputs, handle_of
from lit_align_kernels.token_logprobs.vocabulary_blocks import HeadSettings, TokenStatistics

__all__ = ["TokenStatistics", "WeightHandle", "token_logprobs", "token_logprobs_with_statistics"]

MIN_BLOCK = 256


class _TokenLogprobs(torch.autograd.Function):
    """Without Triton a block of the vocabulary at a time, with it a chunk of tokens at a time."""

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
        triton_bytes: int | None,
    ) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []
        with torch.autocast(hidden.device.type, enabled=False):
            if triton_bytes is None:
                logps, logsumexp = vocabulary_blocks.forward(
                    hidden, weight, bias, targets, settings, kept
                )
            else:
                from lit_align_kernels.token_logprobs import kernel

                tokens = chunks.Chunks(hidden, WeightHandle(weight, bias=bias), triton_bytes, True)
                logps, logsumexp = chunks.forward(
                    tokens, kernel, targets, settings.logit_scale, settings.soft_cap
                )
        ctx.save_for_backward(hidden, weight, selected, bias, targets, logsumexp)
        ctx.entries, ctx.settings, ctx.triton_bytes = entries, settings, triton_bytes
        ctx.kept = kept
        ctx.mark_non_differentiable(logsumexp)
        return logps, logsumexp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            by_blocks = ctx.triton_bytes is None
            found = (_blocks_backward if by_blocks else _triton_backward)(ctx, grad.float())
        d_hidden, d_weight, d_bias = found
        if ctx.needs_input_grad[2]:
            return d_hidden, None, d_weight, d_bias, None, None, None, None
        return d_hidden, d_weight, None, d_bias, None, None, None, None


_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def _needs(ctx: Any) -> tuple[bool, bool, bool]:
    """Whether hidden, weight (or its selected entries) and bias need a gradient."""
    hidden, dense, selected, bias = ctx.needs_input_grad[:4]
    return hidden, dense or selected, bias


def _blocks_backward(ctx: Any, grad: Tensor) -> _Gradients:
    hidden, weight, _, bias, targets, logsumexp = ctx.saved_tensors
    entries = ctx.entries if ctx.needs_input_grad[2] else None
    return vocabulary_blocks.backward(
        grad, logsumexp, hidden, weight, bias, targets, ctx.settings, entries, _needs(ctx),
        ctx.kept,
    )  # fmt: skip


def _triton_backward(ctx: Any, grad: Tensor) -> _Gradients:
    from lit_align_kernels.token_logprobs import kernel

    hidden, weight, selected, bias, targets, logsumexp = ctx.saved_tensors
    s: HeadSettings = ctx.settings
    handle = WeightHandle(weight, selected, ctx.entries, bias)
    tokens = chunks.Chunks(hidden, handle, ctx.triton_bytes, True)
    sums = chunks.Gradients(tokens, _needs(ctx))
    chunks.backward(
        tokens, kernel, targets, logsumexp, grad.contiguous(), s.logit_scale, s.soft_cap, sums
    )
    return sums.hidden, sums.weight, sums.bias


def _block_sizes(
    hidden: Tensor, weight: Tensor, soft_cap: float | None, max_logits_bytes: int
) -> tuple[int, int]:
    """Vocabulary entries of a block, and how many blocks more fit the budget."""
    # At work on a block: its logits, a temporary of logsumexp or exp, and copies of other kinds.
    copies = 2 + (hidden.dtype != torch.float32) + (soft_cap is not None)
    block = max(MIN_BLOCK, max_logits_bytes // (4 * copies * max(1, *hidden.shape)))
    if hidden.device.type == "cpu":
        block = min(block, chunks.CPU_BLOCK)
    block = min(block, weight.shape[0])
    block_bytes = 4 * max(1, len(hidden)) * max(1, block)
    return block, max(0, max_logits_bytes // block_bytes - copies)


def _apply(
    hidden: Tensor,
    weight: Tensor | WeightHandle,
    targets: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    soft_cap: float | None,
    max_logits_bytes: int | None,
) -> tuple[Tensor, Tensor, WeightHandle, HeadSettings]:
    handle = handle_of(weight, bias)
    check_inputs(hidden, handle, targets)
    if max_logits_bytes is None:
        max_logits_bytes = chunks.default_logits_bytes(hidden.device)
    triton = dispatch.implementation_for("token_logprobs", hidden.device) == "triton"
    trained = (hidden, handle.weight, handle.selected, handle.bias)
    wants_gradient = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in trained
    )
    block, kept_blocks = _block_sizes(hidden, handle.weight, soft_cap, max_logits_bytes)
    settings = HeadSettings(logit_scale, soft_cap, block, kept_blocks if wants_gradient else 0)
    logps, logsumexp = _TokenLogprobs.apply(
        *trained, targets, handle.entries, settings, max_logits_bytes if triton else None
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
    max_logits_bytes: int | None = None,
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
        max_logits_bytes: bytes of logits (and of a dense block of the weight's gradient, where
            entries train) that may exist at once; at least 256 of the vocabulary, in Triton one
            token, are taken together. Without Triton what fits is kept for the backward, and the
            rest is formed once more there. None: 32 MiB, on a GPU 512 MiB.

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
    max_logits_bytes: int | None = None,
) -> tuple[Tensor, TokenStatistics]:
    """`token_logprobs`, and what is worth logging of the distributions (one more pass)."""
    logps, logsumexp, handle, settings = _apply(
        hidden, weight, targets, bias, logit_scale, soft_cap, max_logits_bytes
    )
    return logps, vocabulary_blocks.statistics(
        hidden.detach(), handle.weight, handle.bias, targets, logsumexp, settings
    )
