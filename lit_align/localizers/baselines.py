"""Scores to compare with: random ones, and the size of the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_align.localizers.lazy import ElementwiseScores, LazyScores
from lit_align.localizers.stored import Parameters, open_parameters
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


def magnitude_scores(parameters: Parameters) -> ElementwiseScores:
    """|θ| in fp32, of a model, of a mapping name -> parameter, or of a model folder."""
    opened = open_parameters(parameters)
    return ElementwiseScores(opened.shapes, lambda *part: opened.part(*part).abs())
