"""The linear layers of a model: what ILA ranks, under the names of their weights.

A layer is a linear weight: the projections of every block and the head (225 in Llama 2-7B; ILA,
arXiv 2410.17875). A layer is called by its weight's name in `model.named_parameters()`, so a layer
mask is a `ParameterMask` like any other; a head that is tied to the embedding goes by the
embedding's name.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lit_align.errors import ModelError


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer: name of the weight → the module that multiplies by it, in model order.

    `nn.Linear` and its kin (quantised ones too), GPT-2's `Conv1D`, and the head. Fused experts with
    3-D weights, embeddings as such and norms are not among them.

    Raises:
        ModelError: there is none.
    """
    from transformers.pytorch_utils import Conv1D  # here: masks alone need no transformers

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    head = output_head(model)
    found: dict[str, nn.Module] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and (isinstance(module, nn.Linear | Conv1D) or module is head):
            found.setdefault(names[id(weight)], module)
    if not found:
        raise ModelError(f"{type(model).__name__} has no linear layer")
    return found


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that makes the logits, where the model names one."""
    getter: Any = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def module_names(model: nn.Module) -> dict[str, str]:
    """Every linear layer: name of the weight → path of the module (peft's `target_modules`)."""
    paths = {id(module): path for path, module in model.named_modules()}
    return {name: paths[id(module)] for name, module in linear_layers(model).items()}
