"""Adapters on disk, in peft's own folders: `peft.PeftModel.from_pretrained` reads them too."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.tuners.lora import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_align.compact.adapter_layers import ADAPTER, adapted_modules, adapter_state, full_shapes
from lit_align.compact.low_rank import LowRank
from lit_align.errors import ModelError
from lit_align.masks.linear_layers import linear_layers, module_names

PREFIX = "base_model.model."  # of module paths in peft's files
ORIGIN_FILE = "lit_align.json"  # whose adapters they are
NOT_READ = {  # settings of peft under which ΔW is not alpha/r · B A alone
    "use_dora": False, "lora_bias": False, "bias": "none", "modules_to_save": None,
    "alpha_pattern": {}, "trainable_token_indices": None, "target_parameters": None,
    "layer_replication": None,
}  # fmt: skip


def save_adapters(model: nn.Module, folder: str | Path) -> Path:
    """Write a model's adapters as a folder of peft's, whole or not at all.

    Older adapters are replaced; a folder that holds anything else, even beside adapters, is not
    touched.

    Raises:
        ModelError: the model has no adapters, or the folder holds something else.
    """
    state = adapter_state(model)
    folder = Path(folder)
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if others := sorted(found - {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, ORIGIN_FILE}):
        raise ModelError(f"{folder} is not of adapters alone, it holds {others[0]!r}; not replaced")
    config: Any = copy.deepcopy(state.tuner.peft_config[ADAPTER])
    config.inference_mode = True
    if state.settings.kind == "adalora":
        config.rank_pattern = None  # ranks that are gone stand as zeros in E
    tensors: dict[str, Tensor] = {}
    for name, layer in adapted_modules(model).items():
        for key, value in layer.factors().items():
            stored = value.detach().cpu().contiguous()
            tensors[f"{PREFIX}{state.modules[name]}.{key}"] = stored
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        fresh = Path(scratch) / "new"
        config.save_pretrained(str(fresh))
        save_file(tensors, fresh / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        origin = _origin(model) | {"quantization": state.settings.quantization}
        (fresh / ORIGIN_FILE).write_text(json.dumps(origin, indent=2) + "\n")
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        fresh.rename(folder)
    return folder


def _origin(model: nn.Module) -> dict[str, Any]:
    """What the adapters were trained on: the base, and what a delta changed of it first."""
    applied: Any = getattr(model, "lit_align_applied_mask", None)
    return {
        "base_fingerprint": getattr(model, "base_fingerprint", None),
        "delta_mask_digest": None if applied is None else applied.digest,
    }


def load_adapters(folder: str | Path, model: nn.Module) -> dict[str, LowRank]:
    """What the adapters of a folder change of a model's layers; the model stays as it is.

    Args:
        folder: of `save_adapters`, or of peft (LoRA or AdaLoRA).
        model: the base, without adapters.

    Returns:
        Layer name → its change on the CPU in fp32, in model order.

    Raises:
        ModelError: the folder is damaged, its adapters are of another kind, or they belong to
            another model; names the file and the tensor.
    """
    folder = Path(folder)
    config = _read_config(folder)
    _check_origin(folder, model)
    names = {path: name for name, path in module_names(model).items()}
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in _read_tensors(folder).items():
        path, _, factor = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if path not in names or factor not in ("lora_A", "lora_B", "lora_E"):
            raise ModelError(f"{folder}: {key!r} is no factor of a linear layer of this model")
        found.setdefault(names[path], {})[factor] = value.float()
    changes = {name: _change(folder, name, found[name], config) for name in found}
    _check_shapes(folder, changes, model)
    return {name: changes[name] for name in names.values() if name in changes}


def _read_config(folder: Path) -> LoraConfig:
    if not (folder / CONFIG_NAME).is_file():
        raise ModelError(f"{folder} has no {CONFIG_NAME}: it holds no adapters")
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{folder / CONFIG_NAME} is damaged: {error}") from error
    if not isinstance(config, LoraConfig):  # AdaLoraConfig is one
        raise ModelError(
            f"{folder}: adapters of kind {config.peft_type}; LoRA and AdaLoRA are read"
        )
    for name, plain in NOT_READ.items():
        if (getattr(config, name, None) or None) not in (plain or None, None):
            raise ModelError(f"{folder / CONFIG_NAME}: adapters with {name} are not read")
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / SAFETENSORS_WEIGHTS_NAME
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: missing or damaged: {error}") from error


def _check_origin(folder: Path, model: nn.Module) -> None:
    path = folder / ORIGIN_FILE
    if not path.is_file():
        return  # of peft: it knows no fingerprint
    try:
        record = json.loads(path.read_text())
        base, delta = record["base_fingerprint"], record["delta_mask_digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is damaged: {error!r}") from error
    ours = _origin(model)
    if None not in (base, ours["base_fingerprint"]) and base != ours["base_fingerprint"]:
        raise ModelError(
            f"{folder} has adapters of a model with fingerprint {base}, this one's is "
            f"{ours['base_fingerprint']}"
        )
    if delta != ours["delta_mask_digest"]:
        state = "with" if delta else "without"
        raise ModelError(f"{folder} has adapters of the base {state} a delta: load it {state} it")


def _change(folder: Path, name: str, factors: dict[str, Tensor], config: Any) -> LowRank:
    """ΔW = scale · B A of one layer."""
    is_adaptive = config.peft_type == "ADALORA"
    expected = {"lora_A", "lora_B"} | ({"lora_E"} if is_adaptive else set())
    if set(factors) != expected:
        raise ModelError(f"{folder}: {name} has {sorted(factors)}, not {sorted(expected)}")
    a, b = factors["lora_A"], factors["lora_B"]
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
        raise ModelError(f"{folder}: {name}: A {tuple(a.shape)} and B {tuple(b.shape)}")
    if is_adaptive:
        if factors["lora_E"].shape != (len(a), 1):
            raise ModelError(f"{folder}: {name}: E {tuple(factors['lora_E'].shape)}")
        return LowRank(a * factors["lora_E"], b, config.lora_alpha / (config.init_r + 1e-5))
    rank = len(a) ** 0.5 if config.use_rslora else len(a)
    return LowRank(a, b, config.lora_alpha / rank)


def _check_shapes(folder: Path, changes: dict[str, LowRank], model: nn.Module) -> None:
    shapes, layers = full_shapes(model), linear_layers(model)
    for name, change in changes.items():
        expected = shapes[name][::-1] if isinstance(layers[name], Conv1D) else shapes[name]
        if (len(change.b), change.a.shape[1]) != expected:
            raise ModelError(
                f"{folder}: the change of {name} is {(len(change.b), change.a.shape[1])} (out, in) "
                f"and the layer {expected}"
            )
