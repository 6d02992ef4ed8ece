"""Negative preference optimisation, by sequence and by weighted token."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def npo_loss(policy_logps: Tensor, ref_logps: Tensor, beta: float = 0.1) -> Tensor:
    """NPO losses of B responses to be forgotten: −(2/β)·logσ(−β·(log π − log π_ref)).

    Source: Zhang et al. 2024, arXiv 2404.05868, eq. 3. By hand: at policy = reference every loss is
    (2/β)·ln 2, 13.863 at β = 0.1.

    Args:
        policy_logps: (B,) nats, sums over a response's tokens.
        ref_logps: (B,).
        beta: > 0.

    Returns:
        (B,) losses.

    Raises:
        ValueError: beta is not > 0.
    """
    _check_beta(beta)
    return -(2 / beta) * F.logsigmoid(-beta * (policy_logps - ref_logps))


def token_npo_losses(per_token_logps: Tensor, ref_per_token_logps: Tensor, beta: float) -> Tensor:
    """−logσ(−β·(log π_t − log π_ref,t)) of every token, any shape (ALLO, arXiv 2406.12606).

    Raises:
        ValueError: beta is not > 0.
    """
    _check_beta(beta)
    return -F.logsigmoid(-beta * (per_token_logps - ref_per_token_logps))


def token_weighted_npo_loss(
    per_token_logps: Tensor, ref_per_token_logps: Tensor, token_weights: Tensor, beta: float = 0.1
) -> Tensor:
    """ALLO's forgetting loss: Σ_t r_t·[−logσ(−β(log π_t − log π_ref,t))] / #(r ≠ 0).

    By hand: at policy = reference with weights (1, 0, 0.5) it is ln 2 · 1.5 / 2 = 0.5199.

    Args:
        per_token_logps: (N,) or (B, T) nats.
        ref_per_token_logps: same shape.
        token_weights: same shape; 0 leaves a token out.
        beta: > 0.

    Returns:
        Scalar; 0 where every weight is 0.

    Raises:
        ValueError: beta is not > 0.
    """
    counts = token_weights != 0
    # Left out before the loss, not after: a padded position may hold −inf, and its value and its
    # gradient would be 0 · inf = NaN.
    losses = token_npo_losses(
        per_token_logps.where(counts, 0.0), ref_per_token_logps.where(counts, 0.0), beta
    )
    return (token_weights * losses).sum() / counts.sum().clamp(min=1)


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta {beta} must be > 0")
