"""AdaLoRA (arXiv 2303.10512) through peft: ranks move from layers that need few to others.

peft's allocator scores every triplet (a row of A, its singular value in E, a column of B) by
|weight · gradient|, smoothed over steps, and sets the lowest singular values to 0 until `rank` of
them are left a layer on average.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_align.compact.adapter_layers import ADAPTER, adapted_modules, adapter_state
from lit_align.errors import TrainingError

SCORES = ("exp_avg_ipt", "exp_avg_unc")  # peft's names of the smoothed scores
PATTERN = "rank_pattern"


def allocates_ranks(model: nn.Module) -> bool:
    """Whether the model has AdaLoRA adapters."""
    state = model.__dict__.get("lit_align_adapters")
    return state is not None and state.settings.kind == "adalora"


def plan_ranks(model: nn.Module, steps: int) -> None:
    """Lay the schedule over a run of `steps` optimiser steps.

    Raises:
        TrainingError: they are too few to take ranks away in.
    """
    state = adapter_state(model)
    config: Any = state.tuner.peft_config[ADAPTER]
    first = round(state.settings.rank_warmup * steps)
    last = steps - round(state.settings.rank_final * steps)
    if last < first + 2:
        raise TrainingError(
            f"AdaLoRA allocates its ranks between steps {first} and {last}, of {steps} in all: too "
            "few; train longer, lower rank_warmup or rank_final, or use kind: lora"
        )
    config.total_step, config.tinit, config.tfinal = steps, first, steps - last


def allocate_ranks(model: nn.Module, step: int) -> None:
    """Score, and where it is due take ranks away; after the optimiser's step, gradients in place.

    Args:
        model: with gradients of the mean loss.
        step: optimiser steps taken, this one included.
    """
    tuner: Any = adapter_state(model).tuner
    tuner.update_and_allocate(step)


def orthogonality(model: nn.Module) -> Tensor:
    """The regulariser, weighted: the mean of ‖A Aᵀ − I‖ and ‖Bᵀ B − I‖ over all layers."""
    norms = []
    for layer in adapted_modules(model).values():
        for factor in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER].t()):
            identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
            norms.append(torch.linalg.matrix_norm(factor @ factor.t() - identity))
    return adapter_state(model).settings.orthogonality * torch.stack(norms).mean()


def layer_ranks(model: nn.Module) -> dict[str, int]:
    """Layer name → singular values that are not 0."""
    return {
        name: int((layer.lora_E[ADAPTER] != 0).sum())
        for name, layer in adapted_modules(model).items()
    }


def allocation_state(model: nn.Module) -> dict[str, Any]:
    """What the allocation has learnt, for a checkpoint."""
    tuner: Any = adapter_state(model).tuner
    scores = {name: getattr(tuner.rankallocator, name) for name in SCORES}
    return scores | {PATTERN: tuner.peft_config[ADAPTER].rank_pattern}


def load_allocation_state(model: nn.Module, saved: dict[str, Any]) -> None:
    """Go on from a checkpoint."""
    tuner: Any = adapter_state(model).tuner
    parameters = dict(model.named_parameters())
    for name in SCORES:
        scores = {n: t.to(parameters[n].device) for n, t in saved[name].items()}
        setattr(tuner.rankallocator, name, scores)
    # peft begins anew where `ipt`, the last step's scores, has no entry.
    tuner.rankallocator.ipt = dict(tuner.rankallocator.exp_avg_ipt)
    tuner.peft_config[ADAPTER].rank_pattern = saved[PATTERN]
