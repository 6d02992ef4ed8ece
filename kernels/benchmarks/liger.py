"""Liger's implementations, where Liger is installed (an optional competitor)."""

from __future__ import annotations

import importlib.util

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
