"""The output folder of a run: one process at a time, stage folders that appear whole or not at all.

A finished stage is recorded in the manifest first and moved into place second. So whatever moment
a process is killed at, the next one either finds the recorded folder under the partial name and
moves it (`recover`), or finds leftovers that match nothing and removes them.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lit_align.errors import PipelineError
from lit_align.files import sha256_of_file, sync_folder
from lit_align.pipelines.manifest import FileRecord, Manifest, is_inside

LOCK_NAME = ".lock"
MODEL_FOLDER = "model"  # in a stage's folder: a trained model


def partial_folder(output_dir: Path, name: str) -> Path:
    """Where stage `name` writes until it is done."""
    return output_dir / f".stage-{name}.partial"


def _retired_folder(output_dir: Path, name: str) -> Path:
    return output_dir / f".stage-{name}.old"


@contextmanager
def folder_lock(output_dir: Path) -> Iterator[None]:
    """Hold the output folder for this process; the system lets go of it when the process dies.

    Raises:
        PipelineError: Another run works in the folder.
    """
    with (output_dir / LOCK_NAME).open("a+", encoding="utf-8") as handle:
        try:
            _lock(handle)
        except OSError as error:
            handle.seek(0)
            owner = handle.read(32).strip() or "unknown"
            raise PipelineError(
                f"another run (process {owner}) works in {output_dir}: wait for it, or choose "
                "another output folder"
            ) from error
        handle.truncate(0)
        handle.write(f"{os.getpid()}\n")
        handle.flush()
        yield


def _lock(handle: IO[str]) -> None:
    """Lock an open file without waiting; OSError where somebody else holds it."""
    if sys.platform == "win32":
        import msvcrt

        handle.seek(1 << 20)  # past the text: Windows forbids others to read the locked bytes
        msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        handle.seek(0)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def seal(folder: Path) -> tuple[FileRecord, ...]:
    """Make everything in `folder` durable and record it.

    Raises:
        PipelineError: There is no file, or a link or device, which a copy of the folder would lose.
    """
    records = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise PipelineError(f"{path}: a stage may write plain files and folders only")
        if path.is_dir():
            continue
        relative = path.relative_to(folder).as_posix()
        if not is_inside(relative):
            raise PipelineError(f"{path}: the manifest cannot hold this file's name")
        with path.open("rb+" if os.name == "nt" else "rb") as handle:  # Windows: writable only
            os.fsync(handle.fileno())
        records.append(FileRecord(relative, path.stat().st_size, sha256_of_file(path)))
    for path in [*(p for p in folder.rglob("*") if p.is_dir()), folder]:
        sync_folder(path)
    if not records:
        raise PipelineError(f"{folder}: the stage wrote no file")
    return tuple(records)


def publish(output_dir: Path, name: str) -> None:
    """Put the sealed, recorded partial folder of `name` in place of what stood there."""
    final, retired = output_dir / name, _retired_folder(output_dir, name)
    if final.exists():
        os.rename(final, retired)
    os.rename(partial_folder(output_dir, name), final)
    sync_folder(output_dir)
    if retired.exists():
        shutil.rmtree(retired)


def recover(output_dir: Path, manifest: Manifest) -> None:
    """Finish what a killed run had recorded but not yet moved, and remove its leftovers."""
    for name, record in manifest.stages.items():
        partial = partial_folder(output_dir, name)
        if partial.exists() and record.damage(partial) is None and record.damage(output_dir / name):
            publish(output_dir, name)
    for pattern in (".stage-*.partial", ".stage-*.old", ".manifest.json.*.partial"):
        for leftover in output_dir.glob(pattern):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
