"""Losses of a chunk of tokens and their gradient, in place over its logits. Plain torch.

The gradient of a loss L(logp) by the raw products x of the head is, with z = f(x) and target t,

    dL/dx = dL/dlogp · (onehot(t) − softmax(z)) · f′(x)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_align_kernels.token_logprobs.reference import (
    rows_backward_,
    rows_forward,
    target_logits,
)

# (C,) log-probs → the losses (any shape) and the gradient of their sum, (C,)
LossOfLogps = Callable[[Tensor], tuple[Tensor, Tensor]]


def loss_rows_(
    logits: Tensor,
    targets: Tensor,
    loss: LossOfLogps,
    logit_scale: float,
    soft_cap: float | None,
) -> tuple[Tensor, Tensor]:
    """Losses and log-probs of a chunk; the logits become the gradient of the losses' sum.

    Args:
        logits: (C, V) fp32, raw products of the head, bias included; overwritten.
        targets: (C,) int64 in [0, V).
        loss: from log-probs to losses and their gradient.
        logit_scale: factor on the logits.
        soft_cap: c in c·tanh(logits / c), or None.

    Returns:
        What `loss` gives, and the log-probs (C,) fp32.
    """
    if soft_cap is not None or logits.dtype != torch.float32:
        logps, logsumexp = rows_forward(logits, targets, logit_scale, soft_cap)
        losses, grad = loss(logps)
        rows_backward_(logits, targets, logsumexp, grad, logit_scale, soft_cap)
        return losses, logps
    if logit_scale != 1.0:
        logits.mul_(logit_scale)
    # One fused softmax in place reads less than a logsumexp and a gradient. Its largest entry is
    # 1 / Σ exp(z − max z), which stays exact where the target's own probability underflows.
    from_peak = target_logits(logits, targets, 1.0, None) - logits.amax(1)
    torch.softmax(logits, dim=1, out=logits)
    logps = from_peak + logits.amax(1).log()
    losses, grad = loss(logps)
    grad = logit_scale * grad
    at = targets.clamp(0, logits.shape[1] - 1)[:, None]
    logits.mul_(-grad[:, None]).scatter_add_(1, at, grad[:, None])
    return losses, logps


def token_npo(
    logps: Tensor, ref_logps: Tensor, token_weights: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """w·[−logσ(−u)] of every token, u = β·(logp − ref), and its derivative w·β·σ(u), each (N,).

    Both are 0 where the weight is 0, be the log-probs −inf.
    """
    u = (beta * (logps - ref_logps)).where(token_weights != 0, 0.0)
    return token_weights * -F.logsigmoid(-u), token_weights * beta * torch.sigmoid(u)


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
    """Token NPO losses of a chunk; the logits become the gradient of their sum.

    Args:
        logits: (C, V) raw products of the head, bias included; any float dtype, overwritten in it.
        targets: (C,) int64; `ignore_index` gets loss 0, log-prob 0 and gradient 0.
        ref_logps: (C,) fp32.
        token_weights: (C,) fp32; 0 gives loss and gradient 0 whatever the log-probs are.
        beta: > 0.
        logit_scale: factor on the logits.
        soft_cap: c in c·tanh(logits / c), or None.
        ignore_index: target of tokens that do not count.

    Returns:
        Losses and log-probs, each (C,) fp32.
    """
    counted = targets != ignore_index
    weights = token_weights.where(counted, 0.0)
    losses, logps = loss_rows_(
        logits,
        targets.where(counted, 0),
        lambda found: token_npo(found, ref_logps, weights, beta),
        logit_scale,
        soft_cap,
    )
    return losses, logps.where(counted, 0.0)
