"""What a model folder's `config.json` claims, compared with the files beside it.

transformers allocates what a configuration asks for, and fills with random numbers what no file
has, before anybody can see that it was not there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lit_align.config_limits import CONFIG_FILE
from lit_align.errors import ModelError
from lit_align.stored_tensors import tensors_of_folder

ADAPTERS_FILE = "adapter_config.json"
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
VALUES_PER_BYTE = 4  # 2 bits: nobody stores weights in fewer
MOST_BUFFERS = 1 << 26  # values that are computed and not stored: angles, causal masks


def check_claims(folder: Path) -> None:
    """Refuse a folder whose model would be larger than its files, or other than they say.

    Args:
        folder: of a model that brings no code; `check_config_file` has passed it.

    Raises:
        ModelError: the files cannot be read; adapters lie among them, which transformers would add
            unasked; more layers than tensors; or more values than the files can hold.
    """
    if (folder / ADAPTERS_FILE).is_file():
        raise ModelError(
            f"{folder} holds {ADAPTERS_FILE}: adapters, which would change the model unasked; keep "
            "them in a folder of their own"
        )
    stored = tensors_of_folder(folder)
    for name, count in _layer_counts(json.loads((folder / CONFIG_FILE).read_text("utf-8"))):
        if count > len(stored):
            raise ModelError(
                f"{folder / CONFIG_FILE}: {name!r} is {count!r:.40}, and the files have "
                f"{len(stored)} tensors"
            )
    empty = _empty_model(folder)
    held = VALUES_PER_BYTE * sum(tensor.end - tensor.begin for tensor in stored.values())
    for what, values, most in (
        ("parameters", empty.parameters(), held),
        ("buffers", empty.buffers(), held + MOST_BUFFERS),
    ):
        if (claimed := sum(tensor.numel() for tensor in values)) > most:
            raise ModelError(
                f"{folder / CONFIG_FILE} asks for {claimed} values in {what}: more than its files "
                "can hold"
            )


def _layer_counts(settings: Any) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items() if isinstance(settings, dict) else ():
        if name in LAYER_COUNTS and isinstance(value, int | float):
            yield name, value
        yield from _layer_counts(value)


def _empty_model(folder: Path) -> nn.Module:
    """Its modules and shapes, without memory."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        # A configuration may name another program's attention; which one does not matter here.
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", trust_remote_code=False
        )
    return model
