"""JSON of files that anybody may have written, read so that nothing in it can stall the reader.

Python's own reader takes what no other program would agree on (a key that is there twice, NaN) and
what breaks whoever uses it later (lists nested by the thousand, integers of thousands of digits).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 28  # of a file; a safetensors header has a limit of its own
MAX_DEPTH = 64
MAX_INTEGER = 2**64  # magnitude: seeds and sizes are below


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON document.

    Raises:
        ValueError: not UTF-8, no JSON, a key that is there twice, NaN or an infinity, an integer
            beyond 64 bits, or lists and objects nested more than 64 deep.
    """
    text = data.decode("utf-8") if isinstance(data, bytes) else data
    try:
        value = json.loads(
            text,
            object_pairs_hook=unique_names,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except RecursionError as error:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from error
    check_depth(value)
    return value


def read_json_file(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: as `parse_json`; or the file is larger than 256 MiB.
    """
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
    return parse_json(data)


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its names and values; ValueError where a name is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r:.80} is there twice")
    return found


def _integer(text: str) -> int:
    if len(text) > 21 or abs(number := int(text)) >= MAX_INTEGER:
        raise ValueError(f"the number {text:.24}... is too large")
    return number


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text:.24} is no finite number")
    return number


def check_depth(value: Any) -> None:
    """Raise ValueError where lists and objects are nested more than 64 deep."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        nested = [v for v in level if isinstance(v, dict | list)]
        if not nested:
            return
        level = [x for v in nested for x in (v.values() if isinstance(v, dict) else v)]
    raise ValueError(f"nested more than {MAX_DEPTH} deep")


def check_form(value: Any, form: Any, what: str = "it") -> None:
    """Compare a value with the form that a document has to have.

    A form is a type or a tuple of them (True is no int, and `object` is anything), a list with the
    form of all elements, or a dict: name → form of what has to be there, `str` → of all values.

    >>> check_form({"n": 1, "rows": [{"id": 5}]}, {"n": int, "rows": [{"id": str}]})
    Traceback (most recent call last):
    ValueError: it['rows'][0]['id'] is of the type int

    Raises:
        ValueError: names the first place that differs.
    """
    if isinstance(form, list):
        check_form(value, list, what)
        for index, element in enumerate(value):
            check_form(element, form[0], f"{what}[{index}]")
    elif isinstance(form, dict):
        check_form(value, dict, what)
        for name, inner in form.items():
            if name is not str and name not in value:
                raise ValueError(f"{what} lacks {name!r}")
            for each in value if name is str else [name]:
                check_form(value[each], inner, f"{what}[{each!r:.80}]")
    elif form is not object and type(value) not in (form if isinstance(form, tuple) else (form,)):
        raise ValueError(f"{what} is of the type {type(value).__name__}")
