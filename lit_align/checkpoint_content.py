"""What a checkpoint says, by type and range, before Lightning and torch take it as it stands.

They index it, add to its counters and remove files by it: of a checkpoint that was made up, or
changed, the message would otherwise be about their own code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

MAX_COUNT = 2**53
Test = Callable[[Any], bool]


def is_count(value: Any) -> bool:
    """Whether it counts something."""
    return type(value) is int and 0 <= value < MAX_COUNT


def is_seed(value: Any) -> bool:
    """Whether it is a seed of torch's, or none."""
    return value is None or (type(value) is int and 0 <= value < 2**64)


def is_number(value: Any) -> bool:
    """Whether it is one finite number."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and bool(value.isfinite())
    return type(value) in (int, float) and math.isfinite(value)


def _are(test: Test) -> Test:
    return lambda values: isinstance(values, list) and all(map(test, values))


def _are_numbers(value: Any) -> bool:
    """One, several, or none: Adafactor's eps is (None, 0.001)."""
    values = value if isinstance(value, tuple | list) else [value]
    return all(each is None or is_number(each) for each in values)


def _is_path(value: Any) -> bool:
    """Whether it is a path that does not lead up again: Lightning removes what it reads of."""
    return isinstance(value, str) and ".." not in Path(value).parts and "\0" not in value


def _is_score(value: Any) -> bool:
    return value is None or (isinstance(value, Tensor) and value.numel() == 1)


def _is_version(value: Any) -> bool:
    return isinstance(value, str) and value.partition(".")[0].isdecimal() and len(value) < 100


def _are_entries(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    )


def _is_state(value: Any) -> bool:
    return isinstance(value, dict)


def _are_kept(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _is_path(path) and isinstance(score, Tensor) and score.numel() == 1
        for path, score in value.items()
    )


def _are_betas(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(is_number, value))


# What is there must be so; what must be there is said where it is used.
SCHEDULER = {
    "last_epoch": is_count, "_step_count": is_count, "base_lrs": _are(is_number),
    "_last_lr": _are(is_number), "lr_lambdas": _are(lambda v: v is None or isinstance(v, dict)),
}  # fmt: skip
GROUP = {
    "params": _are(lambda v: is_count(v) or isinstance(v, str)), "lr": _are_numbers,
    "initial_lr": is_number, "eps": _are_numbers, "weight_decay": is_number, "rounds": is_count,
    "seed": lambda v: type(v) is int, "betas": _are_betas,
}  # fmt: skip
SAVING = {
    "best_model_score": _is_score, "current_score": _is_score, "kth_value": _is_score,
    "best_model_path": _is_path, "kth_best_model_path": _is_path, "last_model_path": _is_path,
    "best_k_models": _are_kept,
}  # fmt: skip
TOP = {
    "epoch": is_count, "global_step": is_count, "pytorch-lightning_version": _is_version,
    "state_dict": _are_entries, "callbacks": _is_state, "loops": _is_state,
    "hyper_parameters": _is_state, "lr_schedulers": _are(_is_state),
    "optimizer_states": _are(_is_state),
}  # fmt: skip


def check_content(checkpoint: Any) -> None:
    """Refuse what is not the content of a checkpoint.

    Raises:
        ValueError: says what it is.
    """
    if not isinstance(checkpoint, dict):
        raise ValueError(f"it is a {type(checkpoint).__name__}")
    if "global_step" not in checkpoint:
        raise ValueError("it has no global_step")
    _check(checkpoint, TOP, "")
    optimizers = checkpoint.get("optimizer_states", [])
    for at, optimizer in enumerate(optimizers):
        _check_optimizer(optimizer, f"optimizer {at}: ")
    for at, scheduler in enumerate(checkpoint.get("lr_schedulers", [])):
        _check(scheduler, SCHEDULER, f"lr_scheduler {at}: ")
        groups = len(optimizers[at]["param_groups"]) if at < len(optimizers) else None
        lists = [
            len(scheduler[n]) for n in ("base_lrs", "_last_lr", "lr_lambdas") if n in scheduler
        ]
        if groups is not None and any(length != groups for length in lists):
            raise ValueError(f"lr_scheduler {at} is not of its optimizer's {groups} groups")
    for name, state in checkpoint.get("callbacks", {}).items():
        if "Checkpoint" in str(name) and not isinstance(state, dict):
            raise ValueError(f"{name} is {state!r:.100}")
        if isinstance(state, dict) and "best_k_models" in state:
            _check(state, SAVING, f"{name}: ")
            if "best_model_path" not in state or "best_model_score" not in state:
                raise ValueError(f"{name} lacks its best_model_path or best_model_score")


def _check(values: Mapping[str, Any], tests: Mapping[str, Test], where: str) -> None:
    for name, test in tests.items():
        if name in values and not test(values[name]):
            raise ValueError(f"{where}{name} is {values[name]!r:.100}")


def _check_optimizer(state: Mapping[str, Any], where: str) -> None:
    groups, moments = state.get("param_groups"), state.get("state")
    if not isinstance(groups, list) or not isinstance(moments, dict):
        raise ValueError(f"{where}it has no groups or no state")
    for group in groups:
        if not isinstance(group, dict) or "params" not in group:
            raise ValueError(f"{where}a group is {group!r:.100}")
        _check(group, GROUP, where)
    for values in moments.values():
        if not isinstance(values, dict):
            raise ValueError(f"{where}a parameter's state is {values!r:.100}")


def check_alike(theirs: Any, ours: Any, where: str) -> None:
    """Refuse counters that do not have the form of this run's own.

    Raises:
        ValueError: says where they differ.
    """
    if isinstance(ours, dict):
        if not isinstance(theirs, dict) or theirs.keys() != ours.keys():
            raise ValueError(f"{where} is {theirs!r:.100}")
        for name, value in ours.items():
            check_alike(theirs[name], value, f"{where}.{name}")
    elif type(theirs) is not type(ours) or not (isinstance(ours, bool) or is_count(theirs + 1)):
        # (One before the first step is -1: `_batches_that_stepped` where validation is due.)
        raise ValueError(f"{where} is {theirs!r:.100}")
