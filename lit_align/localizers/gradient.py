"""Scores from the gradient of a loss: how steeply it falls along each parameter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lit_align.errors import LocalizationError
from lit_align.localizers.lazy import LazyScores


def gradient_scores(model_or_grads: nn.Module | Mapping[str, Tensor]) -> LazyScores:
    """|Σ grad|: the absolute value of the gradient accumulated over some batches, in fp32.

    At θ itself a DPO loss needs no reference model for it: the policy is the reference there.

    Args:
        model_or_grads: a model after the last `backward` (a parameter that got no gradient scores
            zero everywhere), or a mapping name -> accumulated gradient. Nothing is copied: read the
            scores before the gradients are cleared.

    Raises:
        LocalizationError: no parameter of the model has a gradient.
    """
    if not isinstance(model_or_grads, nn.Module):
        grads = model_or_grads
        return LazyScores(grads, lambda name: grads[name].detach().float().abs())
    parameters = dict(model_or_grads.named_parameters())
    if all(parameter.grad is None for parameter in parameters.values()):
        raise LocalizationError("no parameter has a gradient: run backward before scoring")

    def compute(name: str) -> Tensor:
        grad = parameters[name].grad
        return torch.zeros(parameters[name].shape) if grad is None else grad.float().abs()

    return LazyScores(parameters, compute)
