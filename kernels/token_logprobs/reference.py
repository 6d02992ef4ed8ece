"""Log-probs and gradients from whole rows of logits, in plain torch; what the row kernels compute.

With raw products x of the head, z = f(x) (f scales and soft-caps) and target t:

    logp = z_t − logsumexp(z)        d logp / d x = (onehot(t) − softmax(z)) · f′(x)
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1024  # columns at a time: copies of them stay small


def scaled(logits: Tensor, logit_scale: float, soft_cap: float | None) -> Tensor:
    """f(x) in fp32; a view of `logits` where there is nothing to do."""
    z = logits.float()
    if logit_scale != 1.0:
        z = z * logit_scale
    return z if soft_cap is None else soft_cap * torch.tanh(z / soft_cap)


def scaled_derivative(z: Tensor, logit_scale: float, soft_cap: float | None) -> Tensor:
    """f′(x), of z = f(x)."""
    return logit_scale * (torch.ones_like(z) if soft_cap is None else 1 - (z / soft_cap).square())


def rows_forward(
    logits: Tensor, targets: Tensor, logit_scale: float, soft_cap: float | None
) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets and logsumexp of the logits, each (C,) fp32.

    Args:
        logits: (C, V) raw products of the head, bias included; any float dtype.
        targets: (C,) int64; one outside [0, V) gets NaN.
        logit_scale: factor on the logits.
        soft_cap: c in c·tanh(logits / c), or None.
    """
    parts = [
        scaled(part, logit_scale, soft_cap).logsumexp(1) for part in logits.split(BLOCK, dim=1)
    ]
    logsumexp = torch.stack(parts).logsumexp(0)
    target = target_logits(logits, targets, logit_scale, soft_cap)
    return target - logsumexp, logsumexp


def target_logits(
    logits: Tensor, targets: Tensor, logit_scale: float, soft_cap: float | None
) -> Tensor:
    """z_t of every row, (C,) fp32; NaN where the target lies outside the vocabulary."""
    inside = (targets >= 0) & (targets < logits.shape[1])
    at = targets.where(inside, 0)[:, None]
    return scaled(logits.gather(1, at)[:, 0], logit_scale, soft_cap).where(inside, torch.nan)


def rows_backward_(
    logits: Tensor,
    targets: Tensor,
    logsumexp: Tensor,
    grad: Tensor,
    logit_scale: float,
    soft_cap: float | None,
) -> None:
    """Replace raw products by grad · d logp / d x.

    Args:
        logits: (C, V) as in `rows_forward`, overwritten in their dtype.
        targets: (C,) int64.
        logsumexp: (C,) fp32 from `rows_forward`.
        grad: (C,) fp32.
        logit_scale: factor on the logits.
        soft_cap: c in c·tanh(logits / c), or None.
    """
    columns = torch.arange(logits.shape[1], device=logits.device)
    for part, ids in zip(logits.split(BLOCK, dim=1), columns.split(BLOCK), strict=True):
        z = scaled(part, logit_scale, soft_cap)
        d = (ids == targets[:, None]).float() - (z - logsumexp[:, None]).exp()
        part.copy_(d * scaled_derivative(z, logit_scale, soft_cap) * grad[:, None])
