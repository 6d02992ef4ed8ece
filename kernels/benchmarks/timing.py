"""Time several functions in turn: on a GPU with events, on a CPU with the clock.

The first event is recorded before Python prepares the launches: where these take longer than the
kernels (small sizes on a GPU), the time is the host's. A training step waits for them just so.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def times_ms(
    functions: Mapping[str, Callable[[Any], Any]],
    inputs: Sequence[Any],
    device: torch.device,
    rounds: int,
    warm_up: int = 3,
) -> dict[str, list[float]]:
    """Milliseconds of every call, the functions alternating so that all see the same machine.

    Args:
        functions: name → function of one of the inputs.
        inputs: taken in turn, so that no call finds the last one's data in a cache.
        device: where they run.
        rounds: timed calls of each function.
        warm_up: calls of each that are not timed (compilation, clocks, caches of tables), at least
            one for every input.
    """
    timed: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(-max(warm_up, len(inputs)), rounds):
        for name, function in functions.items():
            elapsed = _one_call_ms(function, inputs[i % len(inputs)], device)
            if i >= 0:
                timed[name].append(elapsed)
    return timed


def _one_call_ms(function: Callable[[Any], Any], value: Any, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        function(value)
        return (time.perf_counter() - start) * 1e3
    start_event, stop_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start_event.record()
    function(value)
    stop_event.record()
    torch.cuda.synchronize(device)
    return start_event.elapsed_time(stop_event)


def median_ms(values: Sequence[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def peak_extra_bytes(function: Callable[[Any], Any], value: Any, device: torch.device) -> int:
    """Most memory that a call holds beyond what it was given and what it returns, in bytes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        results = function(value)
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler writes to stderr
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            results = function(value)
        peak = _peak_allocated(recorded)
    given = _storages(value)
    returned = {at: size for at, size in _storages(results).items() if at not in given}
    return max(0, peak - sum(returned.values()))


def _storages(value: Any) -> dict[int, int]:
    """Address → bytes of every storage that stands behind the tensors in `value`."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    found: dict[int, int] = {}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            found |= _storages(getattr(value, field.name))
    elif isinstance(value, dict):
        found |= _storages(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            found |= _storages(one)
    return found


def _peak_allocated(recorded: Any) -> int:
    """The highest running sum of allocations and frees that the profiler saw, in bytes."""
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
