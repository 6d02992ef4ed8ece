"""Supervised fine-tuning."""

from __future__ import annotations

from torch import Tensor


def sft_loss(per_token_logps: Tensor, token_weights: Tensor | None = None) -> Tensor:
    """Weighted mean of the negative log-likelihood over target tokens: −Σ w·logp / Σ w.

    By hand: logps (−1, −3) give 2; with weights (1, 0) they give 1.

    Args:
        per_token_logps: (N,) nats.
        token_weights: (N,) ≥ 0, or None for 1; a token of weight 0 counts nothing, be it −inf.

    Returns:
        Scalar; 0 where there is no target or every weight is 0.
    """
    if token_weights is None:
        return -per_token_logps.sum() / max(1, per_token_logps.numel())
    total = token_weights.sum()
    counted = per_token_logps.where(token_weights != 0, 0.0)  # a product alone: 0 · −inf is NaN
    return -(counted * token_weights).sum() / total.where(total > 0, 1.0)
