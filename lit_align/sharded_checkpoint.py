"""Sharded checkpoints (torch.distributed.checkpoint), looked through before torch reads them.

torch unpickles their metadata and every value in them that is no tensor, whatever they hold: a
checkpoint of a stranger could run what it likes. What is harmless is known, and little.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from lit_align.errors import TrainingError
from lit_align.unpickling import UNREADABLE_PICKLE

METADATA_FILE = ".metadata"
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
        with (folder / METADATA_FILE).open("rb") as file:
            metadata = _HarmlessUnpickler(file).load()
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
