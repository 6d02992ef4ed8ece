"""Headers of safetensors files, checked against the file before anything is read by them.

As strict as safetensors itself (every byte of the file belongs to one tensor), and stricter in one
point: no name may be there twice, or two readers could see two models in one file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lit_align.errors import ModelError
from lit_align.strict_json import parse_json, read_json_file

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
MAX_DIMENSIONS = 16
BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
FIELDS = {"dtype", "shape", "data_offsets"}


class StoredTensor(NamedTuple):
    """Where a safetensors file holds a tensor."""

    name: str
    dtype: str
    shape: list[int]
    file: Path
    begin: int  # of its bytes in the file
    end: int


def stored_tensors(file: Path) -> list[StoredTensor]:
    """What a safetensors file holds, in the order of its bytes.

    Raises:
        ModelError: the file is missing, damaged or incomplete.
    """
    try:
        return _read_header(file)
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} is damaged or truncated: {error}") from error


def tensors_of_folder(folder: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder, by name, from the headers alone.

    Raises:
        ModelError: there are none, a file is damaged, or two files have a tensor of one name.
    """
    found: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        for tensor in stored_tensors(file):
            if (other := found.setdefault(tensor.name, tensor)) is not tensor:
                raise ModelError(f"{other.file} and {file} both have {tensor.name!r}")
    return found


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files that make up a model folder, sharded or not, sorted by name.

    Raises:
        ModelError: There are none, the index is damaged, or it names what is no file of the folder.
    """
    folder = Path(folder)
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        raise ModelError(f"{folder} has no {SINGLE_FILE} and no {INDEX_FILE}")
    try:
        document = read_json_file(index)
        _require(isinstance(document, dict), "it is no object")
        places = document.get("weight_map")
        _require(isinstance(places, dict) and bool(places), "it has no weight_map")
        _require(all(isinstance(name, str) for name in places.values()), "a file without a name")
    except (OSError, ValueError) as error:
        raise ModelError(f"{index} is damaged: {error}") from error
    names = sorted(set(places.values()))
    for name in names:
        # Of another ending, transformers would read it as something else than safetensors.
        is_plain = Path(name).name == name and name.endswith(".safetensors") and "\\" not in name
        if not is_plain or not (folder / name).is_file():
            raise ModelError(f"{index} names {name!r:.200}, which is not a file in {folder}")
    return [folder / name for name in names]


def _read_header(file: Path) -> list[StoredTensor]:
    with file.open("rb") as stream:
        size = file.stat().st_size
        header_bytes = int.from_bytes(stream.read(8), "little")
        # Compared before it is read: what a file says of itself may be terabytes.
        _require(size >= 8 and header_bytes <= size - 8, "its header does not fit in it")
        _require(header_bytes <= MAX_HEADER_BYTES, "its header is larger than 100 MB")
        header = parse_json(stream.read(header_bytes))
    _require(isinstance(header, dict), "its header is no object")
    _check_metadata(header.pop("__metadata__", {}))
    start = 8 + header_bytes
    found = [_tensor(name, entry, file, start) for name, entry in header.items()]
    found.sort(key=lambda tensor: (tensor.begin, tensor.end))
    position = start
    for tensor in found:
        _require(tensor.end <= size, f"{tensor.name!r} does not fit in it")
        _require(tensor.begin == position, f"{tensor.name!r} does not begin where another ends")
        position = tensor.end
    _require(position == size, "it has bytes that belong to no tensor")
    return found


def _tensor(name: str, entry: Any, file: Path, start: int) -> StoredTensor:
    """One entry of the header; ValueError where it contradicts itself."""
    _require(isinstance(entry, dict) and set(entry) == FIELDS, f"{name!r} is described wrongly")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    _require(isinstance(dtype, str) and dtype in BITS, f"{name!r} is of the dtype {dtype!r:.40}")
    _require(_are_sizes(shape), f"{name!r} has the shape {shape!r:.80}")
    _require(_are_sizes(offsets) and len(offsets) == 2, f"{name!r} has the place {offsets!r:.80}")
    begin, end = offsets
    size_is_right = (end - begin) * 8 == math.prod(shape) * BITS[dtype]
    _require(size_is_right, f"{name!r} has not the size of its shape")
    return StoredTensor(name, dtype, shape, file, start + begin, start + end)


def _are_sizes(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= MAX_DIMENSIONS
        and all(type(n) is int and n >= 0 for n in values)
    )


def _check_metadata(metadata: Any) -> None:
    _require(
        isinstance(metadata, Mapping) and all(isinstance(v, str) for v in metadata.values()),
        "its metadata is not text alone",
    )


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)
