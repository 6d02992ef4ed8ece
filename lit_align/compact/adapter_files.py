"""Adapters on disk, in peft's own folders: `peft.PeftModel.from_pretrained` reads them too."""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_align.compact.adapter_layers import ADAPTER, adapted_modules, adapter_state, full_shapes
from lit_align.compact.low_rank import LowRank
from lit_align.errors import ModelError
from lit_align.masks.io import FLOATS
from lit_align.masks.linear_layers import linear_layers, module_names
from lit_align.stored_tensors import stored_tensors
from lit_align.strict_json import read_json_file

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
        if factor in found.setdefault(names[path], {}):
            raise ModelError(f"{folder}: {factor} of {names[path]} is there twice")
        found[names[path]][factor] = value.float()
    changes = {name: _change(folder, name, found[name], config) for name in found}
    _check_shapes(folder, changes, model)
    return {name: changes[name] for name in names.values() if name in changes}


@dataclasses.dataclass(frozen=True)
class _Scaling:
    """What of peft's settings says how large ΔW is."""

    is_adaptive: bool
    lora_alpha: float
    init_r: int
    use_rslora: bool

    def of_rank(self, rank: int) -> float:
        """The factor before B A."""
        if self.is_adaptive:
            return self.lora_alpha / (self.init_r + 1e-5)
        return self.lora_alpha / (rank**0.5 if self.use_rslora else rank)


def _read_config(folder: Path) -> _Scaling:
    """Of the file alone: peft's classes take any type for any of their settings."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ModelError(f"{folder} has no {CONFIG_NAME}: it holds no adapters")
    try:
        config = read_json_file(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is damaged: no JSON object")
    if (kind := config.get("peft_type")) not in ("LORA", "ADALORA"):
        raise ModelError(f"{folder}: adapters of kind {kind!r:.40}; LoRA and AdaLoRA are read")
    for name, plain in NOT_READ.items():
        if (config.get(name) or None) not in (plain or None, None):
            raise ModelError(f"{path}: adapters with {name} are not read")
    alpha: Any = config.get("lora_alpha")
    rank = config.get("init_r", 12)  # peft's own
    use_rslora = config.get("use_rslora", False)
    if type(alpha) not in (int, float) or type(rank) is not int or rank < 1:
        raise ModelError(f"{path} is damaged: lora_alpha and init_r are no numbers")
    if type(use_rslora) is not bool:
        raise ModelError(f"{path} is damaged: use_rslora is neither true nor false")
    return _Scaling(kind == "ADALORA", float(alpha), rank, use_rslora)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / SAFETENSORS_WEIGHTS_NAME
    try:
        for tensor in stored_tensors(path):
            if tensor.dtype not in FLOATS:
                raise ModelError(f"{tensor.name!r} is stored as {tensor.dtype}, not as floats")
        return load_file(path)
    except (OSError, SafetensorError, ModelError) as error:
        raise ModelError(f"{path}: missing or damaged: {error}") from error


def _check_origin(folder: Path, model: nn.Module) -> None:
    path = folder / ORIGIN_FILE
    if not path.is_file():
        return  # of peft: it knows no fingerprint
    try:
        record = read_json_file(path)
        base, delta = record["base_fingerprint"], record["delta_mask_digest"]
        if not isinstance(base, str | None) or not isinstance(delta, str | None):
            raise ValueError("what the adapters were trained on is no text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is damaged: {error!r}") from error
    ours = _origin(model)
    if None not in (base, ours["base_fingerprint"]) and base != ours["base_fingerprint"]:
        raise ModelError(
            f"{folder} has adapters of a model with fingerprint {base:.64}, this one's is "
            f"{ours['base_fingerprint']}"
        )
    if delta != ours["delta_mask_digest"]:
        state = "with" if delta else "without"
        raise ModelError(f"{folder} has adapters of the base {state} a delta: load it {state} it")


def _change(folder: Path, name: str, factors: dict[str, Tensor], scaling: _Scaling) -> LowRank:
    """ΔW = scale · B A of one layer."""
    expected = {"lora_A", "lora_B"} | ({"lora_E"} if scaling.is_adaptive else set())
    if set(factors) != expected:
        raise ModelError(f"{folder}: {name} has {sorted(factors)}, not {sorted(expected)}")
    a, b = factors["lora_A"], factors["lora_B"]
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or not len(a):
        raise ModelError(f"{folder}: {name}: A {tuple(a.shape)} and B {tuple(b.shape)}")
    if not all(bool(torch.isfinite(factor).all()) for factor in factors.values()):
        raise ModelError(f"{folder}: {name}: its factors are not all finite")
    if scaling.is_adaptive:
        if factors["lora_E"].shape != (len(a), 1):
            raise ModelError(f"{folder}: {name}: E {tuple(factors['lora_E'].shape)}")
        a = a * factors["lora_E"]
    return LowRank(a, b, scaling.of_rank(b.shape[1]))


def _check_shapes(folder: Path, changes: dict[str, LowRank], model: nn.Module) -> None:
    shapes, layers = full_shapes(model), linear_layers(model)
    for name, change in changes.items():
        expected = shapes[name][::-1] if isinstance(layers[name], Conv1D) else shapes[name]
        if (len(change.b), change.a.shape[1]) != expected:
            raise ModelError(
                f"{folder}: the change of {name} is {(len(change.b), change.a.shape[1])} (out, in) "
                f"and the layer {expected}"
            )
