"""Scores to compare with: random ones, and the size of the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_align.localizers.lazy import ElementwiseScores, LazyScores
from lit_align.masks import named_shapes


def random_scores(model_or_shapes: nn.Module | Mapping[str, Any], seed: int) -> LazyScores:
    """Uniform random scores in [0, 1), one draw a parameter from its name and the seed alone.

    Args:
        model_or_shapes: a model, or a mapping name -> shape or tensor.
        seed: the same seed gives a parameter the same scores, whatever else is scored.
    """
    shapes = named_shapes(model_or_shapes)

    def compute(name: str) -> Tensor:
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        return torch.rand(shapes[name], generator=generator, dtype=torch.float32)

    return LazyScores(shapes, compute)


def magnitude_scores(model_or_parameters: nn.Module | Mapping[str, Tensor]) -> ElementwiseScores:
    """|θ| in fp32, of a model or of a mapping name -> parameter."""
    if isinstance(model_or_parameters, nn.Module):
        model_or_parameters = dict(model_or_parameters.named_parameters())
    parameters = {name: p.detach().reshape(-1) for name, p in model_or_parameters.items()}

    def compute(name: str, start: int, stop: int) -> Tensor:
        return parameters[name][start:stop].float().abs()

    return ElementwiseScores(named_shapes(model_or_parameters), compute)
