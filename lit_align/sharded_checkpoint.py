"""Sharded checkpoints (torch.distributed.checkpoint): checksums, and what they hold besides.

torch unpickles their metadata and every value in them that is no tensor, whatever they hold: a
checkpoint of a stranger could run what it likes. What is harmless is known, and little.

Their files have no checksums of their own: a list of them is written with them, last.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from lit_align.errors import TrainingError
from lit_align.files import sha256_of_file, sync_folder, write_atomically
from lit_align.strict_json import read_json_file
from lit_align.unpickling import UNREADABLE_PICKLE, check_tuples

METADATA_FILE = ".metadata"
REST_FILE = "meta.pt"  # Lightning's: whatever is not sharded
CHECKSUMS_FILE = "checksums.json"
FORMAT = "lit-align sharded checkpoint 1"
HARMLESS = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties",
        "ChunkStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "Path"},
    "pathlib._local": {"PosixPath", "WindowsPath", "PurePosixPath", "Path"},
    "collections": {"OrderedDict"},
}  # fmt: skip


class _HarmlessUnpickler(pickle.Unpickler):
    """Finds the classes that describe a checkpoint, and dtypes."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if global_name in HARMLESS.get(module_name, ()):
            return super().find_class(module_name, global_name)
        if module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype):
            return getattr(torch, global_name)
        raise pickle.UnpicklingError(f"it wants {module_name}.{global_name}")


def check_sharded_checkpoint(folder: str | Path) -> None:
    """Make sure that nothing in a sharded checkpoint runs, and that its parts are in its folder.

    Raises:
        TrainingError: it is damaged, names files outside, or holds more than tensors and plain
            values; says which.
    """
    folder = Path(folder)
    try:
        described = (folder / METADATA_FILE).read_bytes()
        check_tuples(described)
        metadata = _HarmlessUnpickler(io.BytesIO(described)).load()
        if not isinstance(metadata, Metadata):
            raise TypeError(f"it is a {type(metadata).__name__}")
        parts = dict(metadata.storage_data)
        kinds = dict(metadata.state_dict_metadata)
        for index, place in parts.items():
            _check_part(folder, place, isinstance(kinds[index.fqn], BytesStorageMetadata))
    except UNREADABLE_PICKLE as error:
        raise TrainingError(
            f"{folder}: not a sharded checkpoint, damaged, or one that brings code: {error}"
        ) from error


def _check_part(folder: Path, place: Any, is_plain: bool) -> None:
    name, begin, length = place.relative_path, place.offset, place.length
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"it names {name!r:.200}, which leads out of it")
    if type(begin) is not int or type(length) is not int or min(begin, length) < 0:
        raise ValueError(f"a part of {name} is at {begin!r:.40}, {length!r:.40}")
    if begin + length > (folder / name).stat().st_size:
        raise ValueError(f"{name} is cut off")
    if is_plain:
        with (folder / name).open("rb") as file:
            file.seek(begin)
            torch.load(io.BytesIO(file.read(length)), map_location="cpu", weights_only=True)


def file_records(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Make files of a folder durable, and say what is in them: {name: {bytes, sha256}}."""
    records = {}
    for name in names:
        with (folder / name).open("rb+" if os.name == "nt" else "rb") as file:
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        records[name] = {"bytes": size, "sha256": sha256_of_file(folder / name)}
    return records


def write_checksums(folder: Path, records: Mapping[str, dict[str, Any]]) -> None:
    """Write the list that says what the folder's files are; without it the folder is none."""
    text = json.dumps({"format": FORMAT, "files": dict(sorted(records.items()))}, indent=1)
    write_atomically(folder / CHECKSUMS_FILE, text.encode() + b"\n")
    sync_folder(folder)


def find_damage_of_shards(folder: Path) -> str | None:
    """What is wrong with the files of a sharded checkpoint, by their checksums; None: nothing."""
    try:
        found = read_json_file(folder / CHECKSUMS_FILE)
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            return f"{CHECKSUMS_FILE} is not of {FORMAT!r}"
        return _compare(folder, found.get("files"))
    except FileNotFoundError:
        return f"it has no {CHECKSUMS_FILE}, which is written last"
    except (OSError, ValueError) as error:
        return f"{CHECKSUMS_FILE}: {error}"


def _compare(folder: Path, records: Any) -> str | None:
    if not isinstance(records, dict) or not {METADATA_FILE, REST_FILE} <= records.keys():
        return f"{CHECKSUMS_FILE} does not list {METADATA_FILE} and {REST_FILE}"
    there = {path.name: path for path in folder.iterdir() if path.name != CHECKSUMS_FILE}
    for name, record in records.items():
        if (path := there.get(name)) is None:
            return f"{name!r:.200} is missing"
        if path.is_symlink() or not path.is_file():
            return f"{name} is no plain file"
        if record != {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}:
            return f"the checksum of {name} is wrong"
    strange = sorted(there.keys() - records.keys())
    return f"{strange[0]} does not belong to it" if strange else None
