"""Which activations are kept for the backward, and which are computed again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

GradientCheckpointing: TypeAlias = bool | Literal["selective"]

# What costs most of a layer's time. Everything between two of them is computed again.
PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_grouped_mm",
    "mkldnn::_linear_pointwise",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
)


def checkpoint_activations(model: PreTrainedModel, how: GradientCheckpointing) -> None:
    """Keep fewer activations of each layer that trains, and compute the others again.

    Frozen layers below the lowest trained parameter keep nothing and are not computed again.

    Args:
        model: whose layers are transformers' own.
        how: True keeps the inputs of layers alone, for a second forward of each; `selective` also
            the results of matrix products and attention, so that only what lies between them
            (norms, activation functions, rotations) is computed again; False keeps everything.
            (Adapters and gates keep few of their products' inputs: `selective` gains little there.
            On a GPU, where none of this has run, compiled FlexAttention is computed again.)
    """
    if not how:
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        settings["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    model.gradient_checkpointing_enable(settings)
    # transformers makes the embedding's output require a gradient, for reentrant checkpoints: all
    # layers would be computed again and differentiated.
    model.disable_input_require_grads()


def _policy(_: Any, op: Callable[..., Any], *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Torch asks for every operation of a layer's forward."""
    is_product = isinstance(op, torch._ops.OpOverload) and op._schema.name in PRODUCTS
    return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE
