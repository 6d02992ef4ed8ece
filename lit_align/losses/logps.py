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
        weights: (N,) factors, or None for 1; a token of weight 0 counts nothing, be it −inf.

    Returns:
        (S,) fp32 (fp64 where given fp64). Example: logps (−1, −2, −4), index (0, 0, 1) → (−3, −4).
    """
    values = per_token_logps.to(torch.promote_types(per_token_logps.dtype, torch.float32))
    if weights is not None:
        values = values.where(weights != 0, 0.0) * weights  # a product alone: 0 · −inf is NaN
    out = torch.zeros(num_sequences, dtype=values.dtype, device=values.device)
    return out.index_add(0, sequence_index, values)


def sequence_lengths(sequence_index: Tensor, num_sequences: int) -> Tensor:
    """Targets of every sequence: (S,) fp32."""
    ones = torch.ones_like(sequence_index, dtype=torch.float32)
    return sequence_logps(ones, sequence_index, num_sequences)
