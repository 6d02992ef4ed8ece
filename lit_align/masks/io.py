"""Masks on disk: one safetensors file whose metadata is a JSON document.

The document lists every parameter (name, kind, shape, axis) with the mask's metadata; a tensor
stands under the parameter's name where rows (int32 or int64) or elements (a bitmap, 1 bit an entry)
are selected. A checksum covers the document, and the digest in it the selection.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lit_align.errors import MaskError
from lit_align.files import write_atomically
from lit_align.masks import bitmap as bits
from lit_align.masks.granularity import Selection, num_rows
from lit_align.masks.metadata import MaskMetadata
from lit_align.strict_json import parse_json

_KEY = "lit_align.parameter_mask"
_DOCUMENT_KEYS = {"metadata", "parameters", "digest"}
FLOATS = ("F16", "BF16", "F32", "F64")
MAX_DIMENSIONS = 16  # more make products of shapes slow, and torch knows no more than 64
# Rows of a parameter are a few bytes in a file, whatever size it says that the parameter has, and
# its entries are gone through for the digest, some rows at a time. No model of today comes near.
MAX_ROW_LENGTH = 2**22
MAX_ENTRIES_WITH_ROWS = 2**36
MAX_ALL_ENTRIES_WITH_ROWS = 2**40
_PARAMETER_KEYS = {"name", "kind", "shape", "axis"}


def write(
    path: Path,
    selections: Mapping[str, Selection],
    metadata: MaskMetadata,
    digest: str,
    extra_tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a mask to `path`, whole or not at all; its folder is made where it is missing.

    `extra_tensors` go into the same file; whoever writes them reads them with `read_extra`.
    """
    document: dict[str, Any] = {
        "metadata": dataclasses.asdict(metadata),
        "parameters": [
            {"name": name, "kind": s.kind, "shape": list(s.shape), "axis": s.axis}
            for name, s in selections.items()
        ],
        "digest": digest,
    }
    try:
        document["checksum"] = _checksum(document)
        text = json.dumps(document, allow_nan=False)
        parse_json(text)  # what could not be read is not written
    except (TypeError, ValueError) as error:
        raise MaskError(f"{path}: the mask's metadata does not fit JSON: {error}") from error
    tensors = {name: t for name, s in selections.items() if (t := _tensor(s)) is not None}
    tensors |= extra_tensors or {}
    _check_parameters(path, document["parameters"])  # or nobody could read it
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save(tensors, {_KEY: text}))


def read(
    path: Path, extra_prefix: str | None = None
) -> tuple[dict[str, Selection], MaskMetadata, str]:
    """The selections, the metadata and the digest of a file; the caller compares the digest.

    Tensors whose names begin with `extra_prefix` are left to `read_extra`.
    """
    if path.is_dir():
        raise MaskError(f"{path} is a folder: name the mask's file in it")
    try:
        with safe_open(path, framework="pt") as file:
            document = _document(path, (file.metadata() or {}).get(_KEY))
            expected = [p["name"] for p in document["parameters"] if _has_tensor(p)]
            _check_tensor_names(path, set(expected), _own_names(file, extra_prefix))
            selections = {p["name"]: _read_selection(path, p, file) for p in document["parameters"]}
    except (SafetensorError, OSError) as error:
        raise MaskError(f"{path}: cannot be read as a mask: {error}") from error
    if len(selections) != len(document["parameters"]):
        raise MaskError(f"{path}: a parameter is listed twice")
    try:
        metadata = MaskMetadata(**document["metadata"])
    except (TypeError, MaskError) as error:
        raise MaskError(f"{path}: {error}") from error
    return selections, metadata, document["digest"]


def read_extra(path: Path, prefix: str, counts: Mapping[str, int]) -> dict[str, Tensor]:
    """The values under a prefix, by the rest of their names.

    Args:
        path: the file.
        prefix: of their names.
        counts: how many values there have to be under every name, and under no other.

    Raises:
        MaskError: the file is missing, damaged or truncated, or the values are others; known
            before they are read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            for name in sorted(counts.keys() - {name.removeprefix(prefix) for name in names}):
                raise MaskError(f"{path}: {name!r} needs {counts[name]} values")
            if len(names) > len(counts):
                raise MaskError(f"{path}: values of parameters that its mask does not select")
            for name, count in counts.items():
                stored = file.get_slice(prefix + name)
                dtype, size = stored.get_dtype(), stored.get_shape()
                if dtype not in FLOATS or size != [count]:
                    raise MaskError(
                        f"{path}: {name!r} needs {count} values that are floats; it has {dtype} "
                        f"of shape {size}"
                    )
            return {name: file.get_tensor(prefix + name).clone() for name in counts}
    except (SafetensorError, OSError) as error:
        raise MaskError(f"{path}: cannot be read: {error}") from error


def _own_names(file: Any, extra_prefix: str | None) -> set[str]:
    names = set(file.keys())
    return {n for n in names if extra_prefix is None or not n.startswith(extra_prefix)}


def _tensor(selection: Selection) -> Tensor | None:
    if selection.rows is None:
        return selection.bitmap
    units = num_rows(selection.shape, selection.axis)
    return selection.rows.to(torch.int32) if units < 2**31 else selection.rows


def _checksum(document: dict[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _document(path: Path, text: str | None) -> dict[str, Any]:
    """Parse and check the JSON document, down to the type of every field that `read` uses."""
    if text is None:
        raise MaskError(f"{path}: not a mask (no {_KEY!r} in its metadata)")
    try:
        document = parse_json(text)
        checksum = document.pop("checksum")
        intact = checksum == _checksum(document) and set(document) == _DOCUMENT_KEYS
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise MaskError(f"{path}: its JSON document is damaged: {error!r}") from error
    if not intact or not isinstance(document["metadata"], dict):
        raise MaskError(f"{path}: its JSON document is damaged: the checksum does not match")
    if not isinstance(document["parameters"], list):
        raise MaskError(f"{path}: the list of parameters is missing")
    _check_parameters(path, document["parameters"])
    return document


def _check_parameters(path: Path, parameters: list[Any]) -> None:
    for parameter in parameters:
        _check_parameter(path, parameter)
    of_rows = [p["shape"] for p in parameters if p["kind"] == "rows"]
    entries = [math.prod(shape) for shape in of_rows]
    if (
        max((shape[-1] for shape in of_rows if shape), default=0) > MAX_ROW_LENGTH
        or max(entries, default=0) > MAX_ENTRIES_WITH_ROWS
        or sum(entries) > MAX_ALL_ENTRIES_WITH_ROWS
    ):
        raise MaskError(f"{path}: its parameters would have {sum(entries)} entries: no model has")


def _check_parameter(path: Path, parameter: Any) -> None:
    well_formed = (
        isinstance(parameter, dict)
        and set(parameter) == _PARAMETER_KEYS
        and isinstance(parameter["name"], str)
        and parameter["name"].isprintable()  # half a surrogate pair names no tensor
        and isinstance(parameter["kind"], str)
        and isinstance(parameter["shape"], list)
        and len(parameter["shape"]) <= MAX_DIMENSIONS
        and all(type(n) is int for n in parameter["shape"])
        and type(parameter["axis"]) is int
    )
    if not well_formed:
        raise MaskError(f"{path}: malformed entry in the list of parameters: {parameter!r:.200}")


def _has_tensor(parameter: dict[str, Any]) -> bool:
    return parameter["kind"] in ("rows", "elements")


def _check_tensor_names(path: Path, expected: set[str], found: set[str]) -> None:
    for name in sorted(expected - found):
        raise MaskError(f"{path}: the tensor of {name!r} is missing")
    for name in sorted(found - expected):
        raise MaskError(f"{path}: unexpected tensor {name!r}")


def _read_selection(path: Path, parameter: dict[str, Any], file: Any) -> Selection:
    name, kind, shape = parameter["name"], parameter["kind"], tuple(parameter["shape"])
    try:
        empty = Selection("none", shape)  # checks the shape before anything is sized by it
        if not _has_tensor(parameter):
            return Selection(kind, shape)
        _check_size(empty, parameter, file.get_slice(name))
        tensor = file.get_tensor(name).clone()  # not a view of the mapped file
        if kind == "elements":
            return Selection.of_bitmap(shape, tensor)
        return Selection.of_rows(shape, tensor.to(torch.int64), parameter["axis"])
    except MaskError as error:
        raise MaskError(f"{path}: {name!r}: {error}") from error


def _check_size(empty: Selection, parameter: dict[str, Any], stored: Any) -> None:
    """Compare the stored tensor's dtype and size with what the shape allows, before reading it."""
    dtype, size = stored.get_dtype(), stored.get_shape()
    if parameter["kind"] == "elements":
        if dtype != "U8" or size != [bits.num_bytes(empty.numel)]:
            raise MaskError(f"a bitmap over {empty.numel} entries is stored as {dtype} {size}")
    elif len(empty.shape) < 2:
        raise MaskError(f"a parameter of shape {empty.shape} has no rows")
    elif dtype not in ("I32", "I64") or len(size) != 1 or size[0] > empty.numel:
        raise MaskError(f"row indices are stored as {dtype} {size}")
