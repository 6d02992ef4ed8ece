"""Scores from the gradient of a loss: how steeply it falls along each parameter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lit_align.errors import LocalizationError
from lit_align.localizers.lazy import ElementwiseScores
from lit_align.masks import named_shapes
from lit_align.shards import FlatTensors


def gradient_scores(model_or_grads: nn.Module | Mapping[str, Tensor]) -> ElementwiseScores:
    """|Σ grad|: the absolute value of the gradient accumulated over some batches, in fp32.

    At θ itself a DPO loss needs no reference model for it: the policy is the reference there.

    Args:
        model_or_grads: a model after the last `backward` (a parameter that got no gradient scores
            zero everywhere), or a mapping name -> accumulated gradient. Nothing is copied: read the
            scores before the gradients are cleared.

    Raises:
        LocalizationError: no parameter of the model has a gradient.
    """
    grads: Mapping[str, Tensor | None]
    if isinstance(model_or_grads, nn.Module):
        grads = {name: p.grad for name, p in model_or_grads.named_parameters()}
        if all(grad is None for grad in grads.values()):
            raise LocalizationError("no parameter has a gradient: run backward before scoring")
    else:
        grads = model_or_grads
    flat = FlatTensors({name: g for name, g in grads.items() if g is not None})

    def compute(name: str, start: int, stop: int) -> Tensor:
        if name not in flat:
            return torch.zeros(stop - start)
        return flat.part(name, start, stop).float().abs()

    return ElementwiseScores(named_shapes(model_or_grads), compute)
