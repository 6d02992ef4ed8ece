"""Architectures to plan for: shipped by name, a `config.json`, or a model folder."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lit_align.config_limits import check_counts
from lit_align.errors import ModelError
from lit_align.gguf_alias import ALIAS
from lit_align.language_model import UNUSABLE, resolve_model

_SHIPPED = resources.files("lit_align.planning") / "configs"


def shipped_configs() -> list[str]:
    """Names of the architectures that come with the package."""
    names = (file.name for file in _SHIPPED.iterdir())
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))


def read_config(name_or_path: str) -> PreTrainedConfig:
    """The configuration of a model; no weights are read.

    Args:
        name_or_path: one of `shipped_configs()`, a `config.json`, a model folder, the alias of the
            embedded model, or a hub id.

    Raises:
        ModelError: it leads nowhere, or is no configuration of a causal language model.
    """
    if name_or_path in shipped_configs():
        text = (_SHIPPED / f"{name_or_path}.json").read_text(encoding="utf-8")
        return _from_dict(json.loads(text), name_or_path)
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        path = _folder(name_or_path) / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is no model configuration: {error}") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{path} is no model configuration: not a JSON object")
    return _from_dict(settings, str(path))


def _folder(name: str) -> Path:
    try:
        return resolve_model(name)
    except ModelError as error:
        known = ", ".join([*shipped_configs(), ALIAS])
        raise ModelError(f"{error}; architectures known by name: {known}") from error


def _from_dict(settings: dict[str, object], source: str) -> PreTrainedConfig:
    check_counts(settings, source)
    kind = settings.get("model_type")
    if not isinstance(kind, str):
        raise ModelError(f"{source} is no model configuration: it has no model_type")
    try:
        rest = {name: value for name, value in settings.items() if name != "model_type"}
        return AutoConfig.for_model(kind, **rest)
    except UNUSABLE as error:
        raise ModelError(f"{source} is a configuration that is not known: {error}") from error


def weightless_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model of that configuration; under `FakeTensorMode` it takes no memory.

    Raises:
        ModelError: there is no causal language model of that kind.
    """
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    except UNUSABLE as error:
        raise ModelError(f"no causal language model for {config.model_type}: {error}") from error
    return model.eval()
