"""A model sharded over processes by FSDP2, under Lightning's ModelParallelStrategy.

Frozen weights, selected entries, their gradients and moments are sharded; a layer's weights are
whole while it computes. A gradient of `selected` goes to the ranks that hold its parts and nothing
else is reduced; after a step `selected` is gathered, one parameter after the other, and each rank
writes its own rows of the weight.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel

from lit_align.compact import links
from lit_align.errors import ModelError, TrainingError
from lit_align.shards import Shard

INSIDE = "lit_align_inside"  # method of a sharded model that runs a function as its forward


def data_parallel_mesh(trainer: Trainer) -> DeviceMesh | None:
    """The processes that a model is sharded over; None under any strategy but ModelParallel.

    Raises:
        TrainingError: the mesh is (partly) tensor-parallel, as it is by default.
    """
    strategy: Any = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        return None
    mesh = strategy.device_mesh
    data, tensor = mesh["data_parallel"].size(), mesh["tensor_parallel"].size()
    if tensor > 1:
        raise TrainingError(
            f"ModelParallelStrategy has {data} data-parallel × {tensor} tensor-parallel processes "
            "(by default all of a node are tensor-parallel), where ranks hold the same weights and "
            f"see the same rows: set its data_parallel_size to {data * tensor}, the number of "
            "processes, and tensor_parallel_size to 1"
        )
    return mesh["data_parallel"]


def leave_inference_mode_out(trainer: Trainer) -> None:
    """Let a sharded model be evaluated without gradients, and not in inference mode.

    Its parameters would be gathered there as tensors that nothing can view or train later. (On gloo
    and under FSDP1 Lightning does so itself.)
    """
    val_loop = trainer.fit_loop.epoch_loop.val_loop
    for loop in (val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        loop.inference_mode = False


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shard a model's parameters over the processes of a mesh, in place, and move it there.

    Args:
        model: restricted to a mask, or wholly trained; the same on every rank.
        mesh: of one dimension.

    Raises:
        TrainingError: something else trains in it.
        ModelError: it does not say what its layers are.
    """
    if not links(model) and not all(p.requires_grad for p in model.parameters()):
        raise TrainingError(
            "ModelParallelStrategy shards models that train wholly or by a mask, not adapters or "
            "gates: use strategy ddp"
        )
    for module in (*reversed(layers(model)), model):
        # The root as well: whatever looks at parameters between steps finds all of them sharded.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for link in links(model):
        state = link.state
        state.shard = Shard.of(state.entries, link.weight)
        if state.base is not None:
            state.base = state.shard.take(state.base).clone()
        state.move_to(link.weight.device, link.weight.dtype)
    setattr(model, INSIDE, types.MethodType(_call, model))
    register_fsdp_forward_method(model, INSIDE)


def layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that are gathered and freed one by one, as the model's class names them.

    Raises:
        ModelError: it names none.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [m for m in model.modules() if names & {kind.__name__ for kind in type(m).__mro__}]
    if not found:
        raise ModelError(
            f"{type(model).__name__} does not name its layers (_no_split_modules): it cannot be "
            "sharded layer by layer; use strategy ddp"
        )
    return found


def inside(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function of (model, ...) find the sharded parameters of the model's root whole.

    The head's product is taken outside the model's own forward: this is a forward to FSDP2.
    """

    @functools.wraps(function)
    def run(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        as_forward = getattr(model, INSIDE, None)
        if as_forward is None:
            return function(model, *args, **kwargs)
        return as_forward(function, *args, **kwargs)

    return run


def _call(model: PreTrainedModel, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(model, *args, **kwargs)
