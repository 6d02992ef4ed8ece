"""What trains in a model, as the state that checkpoints hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lit_align.compact.write_through import sync
from lit_align.errors import TrainingError
from lit_align.shards import local, part_like


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and trainable Parameters: after `restrict`, the selected entries alone."""
    return ((n, p) for n, p in model.named_parameters() if p.requires_grad)


@torch.no_grad()
def load_trainable(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's trained entries in, and write them into the weights.

    Of a sharded model every process has to call this, with its shards or with whole tensors.

    Raises:
        TrainingError: names or shapes are not those of what trains in this model, or a value is no
            finite number.
    """
    trained = dict(trainable(model))
    if wrong := sorted(set(trained) ^ set(state), key=str):
        raise TrainingError(
            f"the checkpoint does not hold what trains here: {wrong[0]} and {len(wrong) - 1} more "
            "stand in one of the two alone; was it written with another mask?"
        )
    for name, parameter in trained.items():
        if state[name].shape != parameter.shape:
            raise TrainingError(
                f"{name} is {tuple(state[name].shape)} in the checkpoint and "
                f"{tuple(parameter.shape)} here"
            )
        if not state[name].is_floating_point() or not local(state[name]).isfinite().all():
            raise TrainingError(f"{name} is not all finite numbers in the checkpoint")
    for name, parameter in trained.items():
        parameter.copy_(part_like(state[name], parameter))
    sync(model)
