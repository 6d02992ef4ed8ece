"""Whether two model folders hold the same architecture and speak the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from lit_align.errors import LocalizationError
from lit_align.language_model import load_tokenizer
from lit_align.localizers.stored import meta_model, read_config
from lit_align.masks import named_shapes

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)


def check_same_architecture(
    base_dir: str | Path, base_model: nn.Module | None, task_dir: str | Path
) -> None:
    """Check that a task model has the type of the base and its parameters' names and shapes.

    Args:
        base_dir: folder of the base, for the message.
        base_model: its model, with or without values; None: it is made where it is needed.
        task_dir: folder of the task model.

    Raises:
        LocalizationError: names both types, or the first parameter that differs.
        ModelError: the folder has no config of a causal language model.
    """
    base_config = read_config(base_dir) if base_model is None else base_model.config
    if _described(base_config) == _described(read_config(task_dir)):
        return
    base_model = meta_model(base_dir) if base_model is None else base_model
    task_model = meta_model(task_dir)
    kinds = [type(model).__name__ for model in (base_model, task_model)]
    if kinds[0] != kinds[1]:
        raise LocalizationError(
            f"{base_dir} is a {kinds[0]} and {task_dir} a {kinds[1]}: heads are compared one with "
            "one, so the task model must be a fine-tuned base"
        )
    base, task = named_shapes(base_model), named_shapes(task_model)
    for name in {**base, **task}:
        if base.get(name) != task.get(name):
            raise LocalizationError(
                f"{name!r} has shape {base.get(name, 'none')} in {base_dir} and "
                f"{task.get(name, 'none')} in {task_dir}: the task model must be a fine-tuned base"
            )
    heads = [_head_numbers(model) for model in (base_model, task_model)]
    if heads[0] != heads[1]:
        raise LocalizationError(
            f"the attention of {base_dir} has {heads[0]}, that of {task_dir} {heads[1]}"
        )


def check_same_tokenizer(base_dir: str | Path, task_dir: str | Path) -> None:
    """Check that two folders split text into the same ids, as far as both have a tokenizer.

    Chat templates and padding may differ. A folder of weights alone has nothing to compare.

    Raises:
        LocalizationError: says what differs.
        ModelError: a tokenizer is damaged.
    """
    folders = [Path(base_dir), Path(task_dir)]
    if not all(any((f / name).is_file() for name in TOKENIZER_FILES) for f in folders):
        return
    files = [folder / "tokenizer.json" for folder in folders]
    if all(f.is_file() for f in files) and files[0].read_bytes() == files[1].read_bytes():
        return
    base, task = (load_tokenizer(folder) for folder in folders)
    vocabularies: list[dict[str, int]] = [t.get_vocab() for t in (base, task)]
    if vocabularies[0] != vocabularies[1]:
        raise LocalizationError(
            f"the tokenizers of {base_dir} and {task_dir} differ: "
            f"{_first_difference(*vocabularies)}"
        )
    for part in ("model", "normalizer", "pre_tokenizer"):
        if _part(base, part) != _part(task, part):
            raise LocalizationError(
                f"the tokenizers of {base_dir} and {task_dir} differ in their {part}: the task "
                "model was trained on other ids than the base"
            )


def _described(config: Any) -> dict[str, Any]:
    """What a model is built from: without where it came from and what wrote it."""
    by_the_way = ("_name_or_path", "transformers_version", "dtype", "use_cache")
    return {key: value for key, value in config.to_dict().items() if key not in by_the_way}


def _head_numbers(model: nn.Module) -> dict[str, Any]:
    config: Any = model.config
    names = ("num_attention_heads", "num_key_value_heads", "head_dim")
    return {name: getattr(config, name, None) for name in names}


def _first_difference(base: dict[str, int], task: dict[str, int]) -> str:
    token = min(token for token in {**base, **task} if base.get(token) != task.get(token))
    ids = [str(v.get(token, "absent")) for v in (base, task)]
    return (
        f"{len(base)} and {len(task)} tokens, and {token!r} is {ids[0]} in the one and {ids[1]} "
        "in the other"
    )


def _part(tokenizer: Any, name: str) -> Any:
    """A part of a fast tokenizer's definition; None of a slow one, which has only words."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else json.loads(backend.to_str()).get(name)
