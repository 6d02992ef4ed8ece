"""The output folder of a run: one process at a time, stage folders that appear whole or not at all.

A finished stage is recorded in the manifest first and moved into place second. So whatever moment
a process is killed at, the next one either finds the recorded folder under the partial name and
moves it (`recover`), or finds leftovers that match nothing and removes them.
"""

import os
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

from lit_align.errors import PipelineError
from lit_align.files import locked_folder, sha256_of_file, sync_folder
from lit_align.pipelines.manifest import FileRecord, Manifest, is_inside

MODEL_FOLDER = "model"  # in a stage's folder: a trained model


def partial_folder(output_dir: Path, name: str) -> Path:
    """Where stage `name` writes until it is done."""
    return output_dir / f".stage-{name}.partial"


def _retired_folder(output_dir: Path, name: str) -> Path:
    return output_dir / f".stage-{name}.old"


def folder_lock(output_dir: Path) -> AbstractContextManager[None]:
    """Hold the output folder for this process.

    Raises:
        PipelineError: Another run works in the folder.
    """
    return locked_folder(output_dir, PipelineError)


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
