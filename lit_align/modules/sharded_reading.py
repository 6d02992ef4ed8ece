"""What trained in a sharded checkpoint, read whole by one process, under no strategy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lit_align.checkpoint_file import load_sound_rest
from lit_align.errors import TrainingError
from lit_align.modules.sharded_saving import UNREADABLE, reason_on_ranks

MODEL = "state_dict."  # of the names of what trains; the optimiser's state stays on the disk


def read_whole(folder: Path) -> dict[str, Any]:
    """A sharded checkpoint in the form of an ordinary one, without the optimiser's state.

    Raises:
        TrainingError: it is damaged, no checkpoint, or brings code.
    """
    checkpoint = load_sound_rest(folder)  # from here on nothing in it is code
    try:
        reader = dcp.FileSystemReader(folder)
        described = reader.read_metadata().state_dict_metadata
        tensors = _room(folder, {n: d for n, d in described.items() if n.startswith(MODEL)})
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    except UNREADABLE as error:
        reason = reason_on_ranks(error)
        raise TrainingError(f"{folder}: not a sharded checkpoint, or damaged: {reason}") from error
    if unread := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise TrainingError(f"{folder}: damaged: its shards do not make up {unread[0]}")
    rank_zero_info(f"{folder}: {len(tensors)} tensors put together from their shards")
    return checkpoint | {"state_dict": {n.removeprefix(MODEL): t for n, t in tensors.items()}}


def _room(folder: Path, described: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors to read into, no larger together than the files; what is not read stays NaN."""
    for name, each in described.items():
        if (
            not isinstance(each, TensorStorageMetadata)
            or not each.properties.dtype.is_floating_point
        ):
            raise TypeError(f"{name!r:.200} is not a tensor of floats")
    claimed = sum(math.prod(d.size) * d.properties.dtype.itemsize for d in described.values())
    if claimed > sum(path.stat().st_size for path in folder.iterdir()):
        raise ValueError(f"it claims {claimed} bytes, more than its files have")
    return {
        name: torch.full(tuple(d.size), torch.nan, dtype=d.properties.dtype)
        for name, d in described.items()
    }
