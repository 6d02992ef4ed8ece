"""Lightning's checkpoints on the disk: written whole, verified when read, the newest sound found.

torch's format is a zip archive, which holds a CRC-32 of every record. torch itself never looks at
them; reading a checkpoint here does, before anything is made of it. Sharded ones are folders.
"""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_align.checkpoint_content import check_content
from lit_align.errors import TrainingError
from lit_align.files import atomic_file, partial_name
from lit_align.sharded_checkpoint import (
    REST_FILE,
    check_sharded_checkpoint,
    find_damage_of_shards,
)
from lit_align.unpickling import UNREADABLE_PICKLE, check_pickles, check_unpickled

VERSION = "pytorch-lightning_version"
SUFFIX = ".ckpt"
KEPT = "checkpoints"  # folder of those that a run takes on its way
NEWEST = ("last", "hpc_ckpt_")  # how the names begin that stand for the newest of a folder
DAMAGE: tuple[type[Exception], ...] = (*UNREADABLE_PICKLE, zlib.error)


class VerifiedCheckpointIO(TorchCheckpointIO):
    """How a run's checkpoints come to the disk and back; other places are left to Lightning."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint whole or not at all, and make it durable.

        Raises:
            TrainingError: it cannot be written; what stood there before still does.
        """
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as handle:
                torch.save(checkpoint, handle)
                handle.flush()
                check_readable(Path(handle.name))
        except (OSError, RuntimeError) as error:
            raise TrainingError(
                f"{path}: the checkpoint could not be written ({reason_of(error)}); the ones "
                "before it are as they were: make room, or choose another folder, and resume"
            ) from error

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; of `last` and `hpc`, the newest sound one beside it if need be.

        Raises:
            TrainingError: it is damaged, or no checkpoint.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        return resumable(load_sound(choose_sound(Path(path))))

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint; a kill amid it leaves nothing that looks like one."""
        if Path(path).is_dir():
            doomed = partial_name(Path(path), os.getpid())
            os.replace(path, doomed)
            path = doomed
        super().remove_checkpoint(path)


def choose_sound(path: Path) -> Path:
    """The checkpoint to read for one that is asked for.

    The names `last` and `hpc_ckpt_N` stand for the newest one: beside a sound one of them that may
    be another by now, written after the job was queued again, in the folder beside it.
    """
    if not path.name.startswith(NEWEST):
        return path
    if path.name.startswith("hpc_ckpt_"):
        found = [*path.parent.glob(f"hpc_ckpt_*{SUFFIX}"), *path.parent.glob(f"{KEPT}/*{SUFFIX}")]
        chosen = newest_sound(found) or path
    else:
        chosen = path
        if find_damage(path):
            chosen = newest_sound(path.parent.glob(f"*{SUFFIX}")) or path
    if chosen != path:
        rank_zero_info(f"{chosen} is the newest sound checkpoint: read in place of {path}")
    return chosen


def load_sound(path: Path) -> dict[str, Any]:
    """A checkpoint whose checksums hold, its tensors mapped from the file; no code is run.

    Raises:
        TrainingError: it is damaged, or no checkpoint; or its tensors are in shards.
    """
    if path.is_dir():
        raise TrainingError(
            f"{path} is a sharded checkpoint: read it under the strategy that wrote it, "
            "ModelParallelStrategy, which takes one process as well"
        )
    checkpoint = _read(path)
    if "state_dict" not in checkpoint:
        raise TrainingError(f"{path}: not a checkpoint: it has no state_dict")
    return checkpoint


def resumable(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint that says which version of Lightning is to read it.

    Raises:
        TrainingError: it does not.
    """
    if VERSION not in checkpoint:
        raise TrainingError(f"not a checkpoint of Lightning: it has no {VERSION}")
    return checkpoint


def load_sound_rest(folder: Path) -> dict[str, Any]:
    """What a sharded checkpoint holds besides shards, all of which have the right checksums.

    Raises:
        TrainingError: it is damaged, no checkpoint, or one that brings code.
    """
    if damage := find_damage(folder):
        raise TrainingError(f"{folder}: not a checkpoint, or damaged ({damage})")
    check_sharded_checkpoint(folder)
    return _read(folder / REST_FILE)


def check_readable(path: Path) -> None:
    """Make sure that what has been written can be read again, before what stood there goes.

    Raises:
        TrainingError: it holds something of a class that no run would take from a file.
    """
    try:
        _unpickled(path)
    except OSError:
        raise
    except DAMAGE as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"a {found[1]}" if found else str(error)
        raise TrainingError(
            f"{path.parent}: no checkpoint is written, since nothing could go on from it: it would "
            f"hold {what}; settings of modules and states of callbacks have to be plain values "
            "(text, numbers, lists, tensors)"
        ) from error


def _read(path: Path) -> dict[str, Any]:
    if damage := find_damage(path):
        raise TrainingError(f"{path}: not a checkpoint, or damaged ({damage})")
    try:
        return _unpickled(path)
    except DAMAGE as error:
        raise TrainingError(f"{path}: not a checkpoint, or damaged ({error})") from error


def _unpickled(path: Path) -> dict[str, Any]:
    check_pickles(path)
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    check_unpickled(checkpoint)
    check_content(checkpoint)
    return checkpoint


def newest_sound(paths: Iterable[Path]) -> Path | None:
    """The newest checkpoint whose checksums hold; those that are damaged are named."""
    for path in sorted(paths, key=lambda p: p.stat().st_mtime_ns, reverse=True):
        damage = find_damage(path)
        if damage is None:
            return path
        rank_zero_warn(f"{path} is damaged ({damage}): the newest sound one before it is used")
    return None


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's file, by its checksums; None: nothing."""
    try:
        stat = path.stat()
    except OSError as error:
        return str(error.strerror)
    if path.is_dir():
        return find_damage_of_shards(path)
    return _find_damage(str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=64)
def _find_damage(path: str, size_bytes: int, mtime_ns: int, inode: int) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                # torch stores records as they are; compressed, a small file could claim any size.
                plain = record.compress_type == zipfile.ZIP_STORED
                if not plain or record.file_size != record.compress_size:
                    return f"{record.filename} is compressed"
            bad = archive.testzip()
    except DAMAGE as error:
        return str(error)
    return None if bad is None else f"the checksum of {bad} is wrong"


def reason_of(error: BaseException) -> str:
    """The system's own words, which torch's writer hides behind an error about itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]
