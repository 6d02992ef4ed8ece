"""Time several functions in turn: on a GPU with events, on a CPU with the clock."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
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
        warm_up: calls of each that are not timed (compilation, clocks, caches of tables).
    """
    timed: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(-warm_up, rounds):
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
    return max(0, peak - sum(r.untyped_storage().nbytes() for r in results))


def _peak_allocated(recorded: Any) -> int:
    """The highest running sum of allocations and frees that the profiler saw, in bytes."""
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
