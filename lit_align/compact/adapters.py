"""LoRA and its kin through peft, inside a model that stays what it was.

peft's layers take the place of the linear layers; everything else of the model (its class, its
decoder, its fingerprint) stays, so that whatever works with a plain model works with this one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, AdaLoraModel, LoraConfig, LoraModel
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_align.compact.adapter_files import load_adapters, save_adapters
from lit_align.compact.adapter_layers import (
    ADAPTER,
    STATE,
    AdapterState,
    adapted_modules,
    adapter_state,
    full_shapes,
    make_adapted,
)
from lit_align.compact.adapter_settings import AdapterSettings
from lit_align.compact.adapter_targets import chosen_modules
from lit_align.compact.low_rank import LowRank
from lit_align.errors import ModelError
from lit_align.masks import ParameterMask
from lit_align.masks.linear_layers import linear_layers

__all__ = [
    "AdapterSettings",
    "adapted_layers",
    "adapter_identity",
    "adapter_share",
    "add_adapters",
    "apply_adapters",
    "has_adapters",
    "load_adapters",
    "merge_adapters",
    "save_adapters",
    "without_adapters",
]


def add_adapters(
    model: PreTrainedModel, settings: AdapterSettings, mask: ParameterMask | None = None
) -> None:
    """Freeze a model and give its layers adapters, in place; they alone train, in fp32.

    A tied head is adapted as a head alone: the embedding's look-up stays the base's.

    Args:
        model: a causal language model without adapters, not restricted.
        settings: which adapters, and where.
        mask: the layers, in place of `settings.layers` and `settings.mask`.

    Raises:
        ModelError: the model has adapters already, or a layer does not exist.
        MaskError: the mask is not of whole linear layers, or belongs to another model.
    """
    if has_adapters(model):
        raise ModelError("the model has adapters already: load it again, or merge them")
    modules = chosen_modules(model, settings, mask)
    with _fp32_by_default(), warnings.catch_warnings():
        # Which is what we want: the head's product is adapted, the look-up is not.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set")  # peft sees to it
        config = _peft_config(settings, list(modules.values()), model)
        kind = LoraModel if settings.kind == "lora" else AdaLoraModel
        tuner = kind(model, config, ADAPTER)
    for path in modules.values():
        make_adapted(model.get_submodule(path))
    model.__dict__[STATE] = AdapterState(settings, modules, tuner)


def _peft_config(settings: AdapterSettings, targets: list[str], model: PreTrainedModel) -> Any:
    modules = [model.get_submodule(path) for path in targets]
    common: dict[str, Any] = {
        "target_modules": targets,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "fan_in_fan_out": all(isinstance(m, Conv1D) for m in modules),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(getattr(model, "base_dir", None) or ""),
    }
    if settings.kind == "lora":
        return LoraConfig(r=settings.rank, **common)
    return AdaLoraConfig(
        init_r=settings.start_rank,
        target_r=settings.rank,
        deltaT=settings.rank_interval,
        orth_reg_weight=settings.orthogonality,
        total_step=1,  # known when training begins
        **common,
    )


@contextlib.contextmanager
def _fp32_by_default() -> Iterator[None]:
    """Initial values are drawn in fp32, whatever the trainer's precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def has_adapters(model: nn.Module) -> bool:
    """Whether `add_adapters` was here."""
    return STATE in model.__dict__


def adapted_layers(model: nn.Module) -> list[str]:
    """Names of the layers that have adapters, in model order."""
    return list(adapter_state(model).modules)


def adapter_share(model: nn.Module) -> float:
    """Entries of the adapters as a share of the base's."""
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    return adapters / sum(math.prod(s) for n, s in full_shapes(model).items() if n in frozen)


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The base alone inside this context: the reference policy."""
    layers: list[Any] = list(adapted_modules(model).values())
    before = [layer.disable_adapters for layer in layers]
    # Not peft's enable_adapters, which decides anew what trains.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def merge_adapters(model: PreTrainedModel) -> None:
    """Write ΔW into the weights, in place: a plain model again, all of it trainable.

    A tied head with an adapter is untied first: the embedding keeps the base's values, the head
    gets a weight of its own (`lm_head.weight`), and `config.tie_word_embeddings` becomes false.

    Raises:
        ModelError: the model has no adapters, or its weights are quantised.
    """
    modules = adapter_state(model).modules
    changes = {
        name: dataclasses.replace(change, a=change.a.detach(), b=change.b.detach())
        for name, change in ((n, layer.low_rank()) for n, layer in adapted_modules(model).items())
    }
    _refuse_quantised(model)
    for path in modules.values():
        parent, _, attribute = path.rpartition(".")
        adapted: Any = model.get_submodule(path)
        setattr(model.get_submodule(parent), attribute, adapted.get_base_layer())
    del model.__dict__[STATE], model.peft_config
    model.requires_grad_(True)
    _write_changes(model, changes)


def apply_adapters(model: PreTrainedModel, folder: str | Path) -> None:
    """Write the adapters of a folder into the weights of their base, in place.

    A tied head is untied as by `merge_adapters`.

    Raises:
        ModelError: see `load_adapters`; or the weights are quantised.
    """
    changes = load_adapters(folder, model)
    _refuse_quantised(model)
    _write_changes(model, changes)


def _refuse_quantised(model: nn.Module) -> None:
    if any(hasattr(p, "quant_state") for p in model.parameters()):
        raise ModelError(
            "adapters cannot be merged into quantised weights: save them, and apply the folder to "
            "the base loaded without quantization"
        )


@torch.no_grad()
def _write_changes(model: PreTrainedModel, changes: dict[str, LowRank]) -> None:
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    for name, layer in linear_layers(model).items():
        if name not in changes:
            continue
        change = changes[name]
        delta = change.scale * (change.b @ change.a)
        weight: Any = layer._parameters["weight"]
        if uses[id(weight)] > 1:
            weight = nn.Parameter(weight.detach().clone())
            layer.register_parameter("weight", weight)
            model.config.tie_word_embeddings = False
            model.config.get_text_config().tie_word_embeddings = False
        weight += (delta.t() if isinstance(layer, Conv1D) else delta).to(weight.device)


def adapter_identity(model: nn.Module) -> dict[str, Any] | None:
    """What a checkpoint's adapter tensors belong to; None without adapters."""
    if not has_adapters(model):
        return None
    state = adapter_state(model)
    names = ("kind", "rank", "alpha", "quantization")
    known = {name: getattr(state.settings, name) for name in names}
    return known | {"start_rank": state.settings.start_rank, "layers": list(state.modules)}
