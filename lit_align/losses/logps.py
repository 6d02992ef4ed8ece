"""From per-token to per-sequence log-probs."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_logps(
    per_token_logps: Tensor,
    sequence_index: Tensor,
    num_sequences: int,
    weights: Tensor | None = None,
) -> Tensor:
    """Sum of the (weighted) log-probs of every sequence's tokens.

    Args:
        per_token_logps: (N,) nats.
        sequence_index: (N,) int64 in [0, num_sequences).
        num_sequences: S.
        weights: (N,) factors, or None for 1.

    Returns:
        (S,) fp32. Example: logps (−1, −2, −4), index (0, 0, 1) → (−3, −4).
    """
    values = per_token_logps.float() if weights is None else per_token_logps.float() * weights
    out = torch.zeros(num_sequences, dtype=torch.float32, device=values.device)
    return out.index_add(0, sequence_index, values)


def sequence_lengths(sequence_index: Tensor, num_sequences: int) -> Tensor:
    """Targets of every sequence: (S,) fp32."""
    ones = torch.ones_like(sequence_index, dtype=torch.float32)
    return sequence_logps(ones, sequence_index, num_sequences)
