"""Checkpoints of several ranks, written whole or not at all and verified when read.

In shards (ModelParallelStrategy) every rank writes its own into a folder of a temporary name and
takes their checksums; the first one lists these and gives the folder its name. Whatever fails on
one rank is an error on all.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, Strategy
from torch.distributed.checkpoint.api import CheckpointException

from lit_align.checkpoint_file import (
    VerifiedCheckpointIO,
    check_readable,
    choose_sound,
    load_sound,
    load_sound_rest,
    reason_of,
    resumable,
)
from lit_align.errors import TrainingError
from lit_align.files import partial_name, sync_folder
from lit_align.sharded_checkpoint import METADATA_FILE, REST_FILE, file_records, write_checksums
from lit_align.shards import part_like
from lit_align.unpickling import UNREADABLE_PICKLE

UNREADABLE: tuple[type[BaseException], ...] = (*UNREADABLE_PICKLE, CheckpointException)
T = TypeVar("T")
Check = Callable[[Mapping[str, Any]], None]


def verify_checkpoints(strategy: Strategy, check: Check) -> None:
    """Have checkpoints written whole and verified, unless the user brings a plugin for them.

    Args:
        strategy: of the run; its own ways are kept for what they do well.
        check: refuses a checkpoint of another run, before shards of it are read.
    """
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = VerifiedCheckpointIO()
    if isinstance(strategy, ModelParallelStrategy):
        vars(strategy).update(
            save_checkpoint=functools.partial(_save, strategy),
            load_checkpoint=functools.partial(_load, strategy, check=check),
        )
    elif isinstance(strategy, ParallelStrategy):
        vars(strategy).update(save_checkpoint=functools.partial(_save_by_one, strategy))


def _save(
    strategy: ModelParallelStrategy,
    checkpoint: dict[str, Any],
    filepath: Any,
    storage_options: Any | None = None,
) -> None:
    """Write a checkpoint, in shards where the strategy is set to.

    Raises:
        TrainingError: it cannot be written; what stood there before still does.
    """
    if storage_options is not None or not strategy._save_distributed_checkpoint:
        return _save_by_one(strategy, checkpoint, filepath, storage_options)
    theirs = functools.partial(type(strategy).save_checkpoint, strategy, checkpoint)
    path = Path(strategy.broadcast(filepath))
    partial = partial_name(path, strategy.broadcast(os.getpid()))
    first = strategy.global_rank == 0
    on_all = functools.partial(_on_all, path, "written; the ones before it are as they were")
    try:
        on_all(lambda: partial.mkdir(parents=True) if first else None)
        on_all(lambda: theirs(partial))
        own = on_all(lambda: _own_records(partial, strategy.global_rank))
        records: dict[str, dict[str, Any]] = {}
        for each in _gathered(own):
            records |= each
        on_all(lambda: _publish(partial, path, records) if first else None)
    finally:
        if first:
            shutil.rmtree(partial, ignore_errors=True)


def _save_by_one(
    strategy: ParallelStrategy, checkpoint: Any, filepath: Any, storage_options: Any = None
) -> None:
    """Write a checkpoint by the first rank.

    Raises:
        TrainingError: it cannot; the others would wait for it.
    """
    theirs = functools.partial(type(strategy).save_checkpoint, strategy, checkpoint)
    _on_all(Path(filepath), "written", lambda: theirs(filepath, storage_options))


def _own_records(folder: Path, rank: int) -> dict[str, dict[str, Any]]:
    names = [path.name for path in folder.glob(f"__{rank}_*")]
    if rank == 0:
        check_readable(folder / REST_FILE)
        names += [METADATA_FILE, REST_FILE]
    return file_records(folder, names)


def _publish(partial: Path, path: Path, records: dict[str, dict[str, Any]]) -> None:
    """Give a folder that is complete its name; what stood there goes.

    Raises:
        TrainingError: other ranks have written elsewhere.
    """
    if elsewhere := [name for name in records if not (partial / name).is_file()]:
        raise TrainingError(
            f"{path}: {elsewhere[0]} of another rank is not there: the folder has to be one that "
            "all machines share; choose another trainer.default_root_dir"
        )
    write_checksums(partial, records)
    replaced = partial.with_name(f"{partial.name.removesuffix('.partial')}.old.partial")
    if path.exists():
        os.replace(path, replaced)
    os.replace(partial, path)
    sync_folder(path.parent)
    if replaced.is_dir():
        shutil.rmtree(replaced)
    else:
        replaced.unlink(missing_ok=True)


def _load(
    strategy: ModelParallelStrategy,
    checkpoint_path: Any,
    weights_only: bool | None = None,
    *,
    check: Check,
) -> dict[str, Any]:
    """Read a checkpoint into the model and its optimiser, and return the rest of it.

    Raises:
        TrainingError: it is damaged, no checkpoint, brings code, or belongs to another run.
    """
    asked = Path(strategy.broadcast(checkpoint_path))

    def chosen() -> Path:
        path = choose_sound(asked)
        check(resumable(load_sound_rest(path) if path.is_dir() else load_sound(path)))
        return path

    # One rank reads through all of it: the others would find the same.
    first = strategy.global_rank == 0
    path = strategy.broadcast(_on_all(asked, "read", lambda: chosen() if first else asked))
    theirs = functools.partial(type(strategy).load_checkpoint, strategy)
    if path.is_file():  # of one process, or of save_distributed_checkpoint: false
        return _on_all(path, "read", lambda: _take_in(strategy, load_sound(path)))
    return _on_all(path, "read", lambda: theirs(path, weights_only=True))


def _take_in(strategy: ModelParallelStrategy, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Load an ordinary checkpoint; of each tensor every rank takes its part."""
    assert strategy.lightning_module is not None
    strategy.lightning_module.load_state_dict(checkpoint["state_dict"])
    states = checkpoint.get("optimizer_states", ())
    for optimizer, state in zip(strategy.optimizers, states, strict=False):
        ours = [p for group in optimizer.param_groups for p in group["params"]]
        saved = [i for group in state["param_groups"] for i in group["params"]]
        parts = {
            i: {name: part_like(value, p) for name, value in state["state"][i].items()}
            for i, p in zip(saved, ours, strict=True)
            if i in state["state"]
        }
        optimizer.load_state_dict(state | {"state": parts})
    return checkpoint


def _on_all(path: Path, what: str, act: Callable[[], T]) -> T:
    """Do something on every rank; where it fails on one, it has failed on all.

    Raises:
        TrainingError: it has; says where and why.
    """
    failure, done = None, None
    try:
        done = act()
    except TrainingError as error:
        failure = str(error)
    except UNREADABLE as error:
        failure = f"{path}: the checkpoint could not be {what} ({reason_on_ranks(error)})"
    if failures := [each for each in _gathered(failure) if each is not None]:
        raise TrainingError(failures[0])
    return cast(T, done)


def _gathered(value: T) -> list[T]:
    """Every rank's value."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def reason_on_ranks(error: BaseException) -> str:
    """In a line, what an error is about; of all ranks' errors the first."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return reason_of(error)
