"""What a model's `config.json` may ask for: transformers makes lists and modules as it says."""

from __future__ import annotations

import json  # the strict reader would not do: configurations may hold Infinity
import re
from pathlib import Path
from typing import Any

from lit_align.errors import ModelError
from lit_align.strict_json import MAX_BYTES, check_depth

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer_config.json"
# Names of how many there are of something that is made one by one.
COUNTED = re.compile(r".*(layers?|blocks|experts|groups|depth|codebooks|num_labels)")
MOST = 10_000
# Names of what computes a part of it: transformers takes `owner/name` for code from the hub.
PROGRAMS = re.compile(r".*_implementation(_internal)?")


def check_counts(settings: Any, source: str | Path) -> None:
    """Refuse a configuration whose model could not be listed, let alone held, or that brings code.

    Raises:
        ModelError: more than 10,000 layers, experts or the like, or an attention that is a program
            from the hub; names the setting.
    """
    try:
        check_depth(settings)
    except ValueError as error:
        raise ModelError(f"{source} is no model configuration: {error}") from error
    level = [settings]
    while level:
        objects = [each for each in level if isinstance(each, dict)]
        for name, value in ((n, v) for each in objects for n, v in each.items()):
            if COUNTED.fullmatch(name) and isinstance(value, int | float) and abs(value) > MOST:
                raise ModelError(f"{source}: {name!r:.80} is {value!r:.40}: no model has so many")
            if PROGRAMS.fullmatch(name) and not _is_known_program(value):
                raise ModelError(
                    f"{source}: {name!r:.80} is {value!r:.80}, a program of somebody else's, which "
                    "is not run: remove the setting"
                )
        level = [v for o in objects for v in o.values()]


def _is_known_program(value: Any) -> bool:
    """Whether it is a plain name, or one for each part of a model."""
    values = value.values() if isinstance(value, dict) else [value]
    return all(each is None or (isinstance(each, str) and each.isidentifier()) for each in values)


def check_config_file(folder: str | Path) -> None:
    """`check_counts` of a model folder's configuration, where it has one.

    Raises:
        ModelError: as `check_counts`, the file is no JSON, or a pipe or device lies in the folder,
            which would be read without end.
    """
    for path in Path(folder).iterdir():
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ModelError(f"{path} is no plain file")
    path = Path(folder) / CONFIG_FILE
    if path.is_file():  # else transformers says so in its own words
        check_counts(_settings(path), path)


def check_tokenizer_files(folder: str | Path) -> None:
    """See that a tokenizer's settings name no file outside its folder: transformers would read it.

    Raises:
        ModelError: they do, or are no JSON.
    """
    path = Path(folder) / TOKENIZER_FILE
    names = _settings(path).get("fast_tokenizer_files", []) if path.is_file() else []
    for name in names if isinstance(names, list) else [names]:
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise ModelError(f"{path} names {name!r:.200}, which is no file in its folder")


def _settings(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is no model configuration: {error}") from error
    return settings
