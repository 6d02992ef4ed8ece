"""What a fine-tuning changed: low-rank or whole changes of linear layers, and what else moved."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_align.compact.adapter_files import load_adapters, save_adapters
from lit_align.compact.adapters import has_adapters
from lit_align.compact.delta import Delta, base_shapes, export_delta, selected_names
from lit_align.compact.low_rank import LowRank
from lit_align.errors import ModelError
from lit_align.files import sha256_of_file
from lit_align.language_model import fingerprint
from lit_align.localizers.same_model import check_same_architecture, check_same_tokenizer
from lit_align.localizers.stored import StoredParameters
from lit_align.masks import ParameterMask
from lit_align.masks.linear_layers import linear_layers
from lit_align_kernels.swap_selected import scatter_selected_

DELTA_FILE = "delta.safetensors"
ADAPTER_FILE = "adapter_config.json"
ADAPTER_TENSORS = "adapter_model.safetensors"


@dataclasses.dataclass(frozen=True)
class Change:
    """What a fine-tuning made of a base.

    Attributes:
        layers: linear layer → its change: low-rank, or ΔW in the weight's shape and dtype. Layers
            that did not change are not in it.
        others: parameter → its values after the fine-tuning, of what else changed (norms, biases,
            an untied embedding).
    """

    layers: dict[str, LowRank | Tensor]
    others: dict[str, Tensor]


def save_change(model: nn.Module, folder: str | Path) -> Path:
    """Write what training made of a model, so that `read_change` finds it.

    A model with adapters becomes peft's adapter folder, any other a delta: of the mask that it was
    restricted to, or of all its parameters.

    Returns:
        The folder.

    Raises:
        ModelError: the folder holds a change of the other kind, or adapters beside other files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if has_adapters(model):
        save_adapters(model, folder)
        return folder
    if (folder / ADAPTER_FILE).exists():  # which `read_change` would go on reading
        raise ModelError(f"{folder} holds adapters: a delta does not replace them")
    mask = None
    if getattr(model, "lit_align_mask", None) is None:
        mask = ParameterMask.full(
            base_shapes(model), base_fingerprint=getattr(model, "base_fingerprint", None)
        )
    export_delta(model, folder / DELTA_FILE, mask)
    return folder


def read_change(folder: str | Path, model: nn.Module) -> Change:
    """The change in a folder, against the base that `model` is.

    Args:
        folder: of adapters, of a delta (`save_change` writes either), or a whole model: the task
            model that the base was fine-tuned into.
        model: the base, as it was loaded; its weights are read.

    Raises:
        ModelError: the folder holds none of these, its adapters are another model's, or no linear
            layer changed.
        LocalizationError: the task model has another architecture, shape or tokenizer.
        DeltaError: the delta is damaged.
        MaskError: the delta belongs to another base.
    """
    folder = Path(folder)
    if (folder / ADAPTER_FILE).is_file():
        found = Change(dict(load_adapters(folder, model)), {})
    elif (folder / DELTA_FILE).is_file():
        found = _of_delta(folder / DELTA_FILE, model)
    elif (folder / "config.json").is_file():
        found = _of_model(folder, model)
    else:
        raise ModelError(
            f"{folder} holds no change: neither adapters ({ADAPTER_FILE}) nor a delta "
            f"({DELTA_FILE}) nor a model (config.json)"
        )
    if not found.layers:
        raise ModelError(f"{folder}: no linear layer differs from the base: there is no change")
    return found


@torch.no_grad()
def _of_delta(path: Path, model: nn.Module) -> Change:
    delta = Delta.load(path)
    delta.mask.check_matches(model, getattr(model, "base_fingerprint", None))
    parameters, values = dict(model.named_parameters()), dict(delta.values)
    found = Change({}, {})
    layers = linear_layers(model)
    for name in selected_names(delta.mask):
        weight = parameters[name].detach()
        final = weight.float()
        final = final.clone() if final is weight else final
        entries = delta.mask.entries(name).to(weight.device)
        scatter_selected_([(final, entries, values.pop(name).to(final.device, final.dtype))])
        _note(found, name, weight, final, name in layers)
    return found


@torch.no_grad()
def _of_model(folder: Path, model: nn.Module) -> Change:
    base_dir: Any = getattr(model, "base_dir", type(model).__name__)
    check_same_architecture(base_dir, model, folder)
    check_same_tokenizer(base_dir, folder)
    parameters = dict(model.named_parameters())
    stored = StoredParameters(folder, {n: tuple(p.shape) for n, p in parameters.items()})
    found = Change({}, {})
    layers = linear_layers(model)
    for name, parameter in parameters.items():
        weight = parameter.detach()
        _note(found, name, weight, stored.read(name).to(weight.device), name in layers)
    return found


def _note(found: Change, name: str, base: Tensor, final: Tensor, is_layer: bool) -> None:
    """Take a parameter's final values (fp32, written to) into the change, if they differ."""
    if torch.equal(final, base.float()):
        return
    if is_layer:
        found.layers[name] = final.sub_(base).to(base.dtype)
    else:
        found.others[name] = final.to(base.dtype)


def change_checksum(folder: str | Path) -> str:
    """SHA-256 (hex) of the tensors of a change's folder.

    Raises:
        ModelError: the folder holds no change.
    """
    folder = Path(folder)
    for name in (ADAPTER_TENSORS, DELTA_FILE):
        if (folder / name).is_file():
            return sha256_of_file(folder / name)
    return fingerprint(folder)
