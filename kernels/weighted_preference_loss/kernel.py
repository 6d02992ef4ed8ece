"""Token NPO in Triton: loss and gradient of a chunk of logits in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_align_kernels.token_logprobs.kernel import check_rows, launch_options
from lit_align_kernels.token_logprobs.row import (
    load_target,
    softmax_sum,
    target_logit,
    write_gradient,
)


@triton.jit
def softplus(u):
    """log(1 + e^u), to full relative accuracy also where e^u is far below 1."""
    e = tl.exp(-tl.abs(u))
    s = 1.0 + e
    # log(s) · e / (s - 1) is log1p(e) with the rounding of s taken out; for s = 1 it is e.
    tail = tl.where(s == 1.0, e, tl.log(s) * (e / tl.where(s == 1.0, 1.0, s - 1.0)))
    return tl.maximum(u, 0.0) + tail


@triton.jit
def npo_kernel(
    logits_ptr, targets_ptr, ref_logps_ptr, token_weights_ptr, losses_ptr, logps_ptr, stride, V,
    beta, logit_scale, soft_cap, ignore_index,
    CAPPED: tl.constexpr, EDGES: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Loss, log-prob and gradient of one token; the row is read twice, then out of cache."""
    row = tl.program_id(0)
    ignored = tl.load(targets_ptr + row) == ignore_index  # table
    target, valid = load_target(targets_ptr, row, V)
    z = target_logit(
        logits_ptr, row, stride, target, valid & (ignored == 0), logit_scale, soft_cap, CAPPED
    )
    # Of an ignored token's row nothing is read.
    columns = tl.where(ignored, 0, V)
    peak, total = softmax_sum(
        logits_ptr, row, stride, columns, logit_scale, soft_cap, CAPPED, EDGES, UNROLL, LANES
    )
    logp = tl.where(ignored, 0.0, (z - peak) - tl.log(total))
    ref_logp = tl.load(ref_logps_ptr + row)  # table
    weight = tl.load(token_weights_ptr + row)  # table
    weight = tl.where(ignored, 0.0, weight)
    u = beta * (logp - ref_logp)
    left_out = weight == 0.0  # exactly 0, also where a log-prob is infinite or NaN
    tl.store(losses_ptr + row, tl.where(left_out, 0.0, weight * softplus(u)))  # table
    tl.store(logps_ptr + row, logp)  # table
    grad = tl.where(left_out, 0.0, weight * beta / (1.0 + tl.exp(-u)))
    # Every warp has read the target's logit and the edges of the row, and one warp overwrites them:
    # what separates the two is the barrier in the sum over all lanes that ends softmax_sum. It has
    # to stay behind the last read of the row, and the reads before it. (When write_gradient reads
    # the edges again, warps other than the one that stores them may see gradients: they drop them.)
    write_gradient(
        logits_ptr, row, stride, V, target, peak + tl.log(total), grad, logit_scale, soft_cap,
        CAPPED, EDGES, UNROLL, LANES,
    )  # fmt: skip


def npo_rows_(
    logits: Tensor,
    targets: Tensor,
    ref_logps: Tensor,
    token_weights: Tensor,
    beta: float,
    logit_scale: float,
    soft_cap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Token NPO losses w·[-logσ(-β·(logp - ref))]; their gradient replaces the logits.

    Args:
        logits: (C, V) raw products of the head, bias included; fp32, bf16 or fp16. Overwritten by
            the gradient of the sum of the losses.
        targets: (C,) int64. `ignore_index`: loss 0, log-prob 0, gradient 0. Any other outside
            [0, V): NaN.
        ref_logps: (C,) fp32.
        token_weights: (C,) fp32; 0 gives loss 0 and gradient 0 whatever the log-probs are.
        beta: > 0.
        logit_scale: factor on the logits.
        soft_cap: c in c·tanh(logits / c), or None.
        ignore_index: target of tokens that do not count.

    Returns:
        Losses and log-probs, each (C,) fp32.

    Raises:
        ValueError: where shapes or strides do not fit.
    """
    targets, ref_logps, token_weights = check_rows(
        logits, targets=targets, ref_logps=ref_logps, token_weights=token_weights
    )
    losses = torch.empty(logits.shape[:1], dtype=torch.float32, device=logits.device)
    logps = torch.empty_like(losses)
    if logits.numel():
        with torch.cuda.device_of(logits):
            npo_kernel[(logits.shape[0],)](
                logits,
                targets,
                ref_logps,
                token_weights,
                losses,
                logps,
                beta=float(beta),
                logit_scale=float(logit_scale),
                ignore_index=ignore_index,
                **launch_options(logits, soft_cap),
            )
    return losses, logps
