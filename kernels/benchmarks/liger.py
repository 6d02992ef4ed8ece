"""Liger's implementations, where Liger is installed (an optional competitor)."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor


def is_installed() -> bool:
    """Whether `liger_kernel` can be imported."""
    return importlib.util.find_spec("liger_kernel") is not None


def fused_linear_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probs of the targets by Liger's fused linear cross-entropy: (N,)."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    loss = LigerFusedLinearCrossEntropyFunction.apply(
        hidden, weight, targets, None, None, -100, 0.0, 0.0, "none"
    )
    return -(loss[0] if isinstance(loss, tuple) else loss)


def fused_linear_dpo(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    pairs: int,
    beta: float,
    compiled: bool = True,
) -> Tensor:
    """The mean DPO loss without a reference, over pairs of two responses of equal length.

    Liger wants all chosen responses before all rejected ones, has no token weights, and computes a
    reference from hidden states of its own, never from given log-probs.
    """
    from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOLoss

    def stacked(by_pair: Tensor) -> Tensor:
        half = by_pair.shape[0] // (2 * pairs)
        responses = by_pair.view(pairs, 2, half, *by_pair.shape[1:]).transpose(0, 1)
        return responses.reshape(2 * pairs, half, *by_pair.shape[1:])

    loss = LigerFusedLinearDPOLoss(beta=beta, compiled=compiled, use_ref_model=False)
    found: Tensor | tuple[Tensor, ...] = loss(weight, stacked(hidden), stacked(targets))
    return found if isinstance(found, torch.Tensor) else found[0]
