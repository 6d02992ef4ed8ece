"""Choosing the next token: the likeliest, or one drawn by temperature and nucleus (top-p)."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

NUCLEUS_WIDTH = 256  # sorting a whole vocabulary at every step would cost as much as the model


def uniform_numbers(seed: int, prompt: int | str, sample: int, count: int) -> Tensor:
    """(count,) fp32 in [0, 1): the draws of one sample, whatever batch it is generated in."""
    key = hashlib.sha256(f"{seed}/{prompt}/{sample}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
    return torch.rand(count, generator=generator)


def draw(logits: Tensor, temperature: float, top_p: float, uniform: Tensor) -> Tensor:
    """The next token of every row, by inversion of its cumulative distribution.

    Args:
        logits: (R, V).
        temperature: 0 takes the likeliest token.
        top_p: tokens outside the smallest set with this probability are not drawn; 1 keeps all.
        uniform: (R,) in [0, 1).

    Returns:
        (R,) int64 token ids.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        probabilities, token_ids = _nucleus(probabilities, top_p, NUCLEUS_WIDTH)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    # Rounding must not carry the target onto the total, past the last token.
    target = uniform.to(total)[:, None] * total
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    # right=True: the first token whose cumulative probability is greater, so one that has a share.
    index = torch.searchsorted(cumulative, target, right=True)
    return (token_ids.gather(-1, index) if top_p < 1 else index).squeeze(-1)


def _nucleus(probabilities: Tensor, top_p: float, width: int) -> tuple[Tensor, Tensor]:
    """Probabilities (0 outside the nucleus) and token ids, (R, W), likeliest first."""
    width = min(width, probabilities.shape[-1])
    values, token_ids = probabilities.topk(width)
    cumulative = values.cumsum(-1)
    if width < probabilities.shape[-1] and bool((cumulative[:, -1] < top_p).any()):
        return _nucleus(probabilities, top_p, width * 8)
    outside = cumulative - values >= top_p
    return values.masked_fill(outside, 0.0), token_ids
