"""Lightning's checkpoints as files: written whole, verified when read, the newest sound one found.

torch's format is a zip archive, which holds a CRC-32 of every record. torch itself never looks at
them; reading a checkpoint here does, before anything is made of it.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from lit_align.errors import TrainingError
from lit_align.files import atomic_file
from lit_align.unpickling import UNREADABLE_PICKLE

SUFFIX = ".ckpt"
NEWEST = ("last", "hpc_ckpt_")  # how the names begin that stand for the newest of a folder
DAMAGE: tuple[type[Exception], ...] = (*UNREADABLE_PICKLE, zipfile.BadZipFile, zlib.error)


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
        except (OSError, RuntimeError) as error:
            raise TrainingError(
                f"{path}: the checkpoint could not be written ({_reason(error)}); the ones before "
                "it are as they were: make room, or choose another folder, and resume"
            ) from error

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; of `last` and `hpc`, the newest sound one beside it if need be.

        Raises:
            TrainingError: it is damaged, or no checkpoint.
        """
        if "://" in str(path) or Path(path).is_dir():
            return super().load_checkpoint(path, map_location, weights_only)
        path = Path(path)
        if path.name.startswith(NEWEST) and find_damage(path):
            begin = "hpc_ckpt_" if path.name.startswith("hpc_ckpt_") else ""
            path = newest_sound(path.parent.glob(f"{begin}*{SUFFIX}")) or path
        return load_sound(path)


def load_sound(path: Path) -> dict[str, Any]:
    """A checkpoint whose checksums hold, its tensors mapped from the file; no code is run.

    Raises:
        TrainingError: it is damaged, or no checkpoint.
    """
    if damage := find_damage(path):
        raise TrainingError(f"{path}: not a checkpoint, or damaged ({damage})")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        tensors, step = checkpoint["state_dict"], checkpoint["global_step"]
        sound = isinstance(step, int) and all(isinstance(t, torch.Tensor) for t in tensors.values())
    except DAMAGE as error:
        raise TrainingError(f"{path}: not a checkpoint, or damaged ({error})") from error
    if not sound:
        raise TrainingError(f"{path}: not a checkpoint: state_dict and global_step are not its own")
    return checkpoint


def newest_sound(paths: Iterable[Path]) -> Path | None:
    """The newest checkpoint whose checksums hold; those that are damaged are named."""
    for path in sorted(paths, key=lambda p: p.stat().st_mtime_ns, reverse=True):
        damage = find_damage(path)
        if damage is None:
            return path
        rank_zero_warn(f"{path} is damaged ({damage}): the newest checkpoint before it is used")
    return None


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's file, by its checksums; None: nothing."""
    try:
        stat = path.stat()
    except OSError as error:
        return str(error.strerror)
    if path.is_dir():  # of torch.distributed.checkpoint, which writes its metadata last
        return None if (path / ".metadata").exists() else "it was not written to its end"
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


def _reason(error: BaseException) -> str:
    """The system's own words, which torch's writer hides behind an error about itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]
