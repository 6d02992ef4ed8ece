"""Stopwatch and scales of a worker: the same for every method."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from lit_align.peak_memory import PeakMemory, peak_memory_mib
from lit_align.pipelines.training_bench.job import Job, Result


class Watch:
    """Measures one run; a runner calls it where training begins and where each step ends.

    Attributes:
        losses: of the steps so far.
        reference_seconds: of the reference's pass before training, where there is one.
    """

    def __init__(self, job: Job) -> None:
        """Take the memory that the imports need: a runner's module is imported before."""
        self.job = job
        self.device = torch.device(job.device)
        self.losses: list[float] = []
        self.reference_seconds: float | None = None
        self._stamps: list[float] = []
        with PeakMemory() as now:
            pass
        self._imports_mib = now.mib if now.mib is not None else float("nan")
        self._peak = PeakMemory()
        self._peak.__enter__()
        self._peak_mib = float("nan")

    def start(self) -> None:
        """Training begins."""
        self._stamp()

    def step(self, loss: float | Tensor) -> None:
        """A step ends: its update is done."""
        self.losses.append(float(loss))
        self._stamp()
        if len(self.losses) == self.job.steps:
            self._read_peak()

    @contextmanager
    def reference_pass(self) -> Iterator[None]:
        """Time the reference's pass over all pairs."""
        started = self._now()
        yield
        self.reference_seconds = (self.reference_seconds or 0.0) + self._now() - started

    def result(
        self,
        *,
        trained_parameters: int,
        optimizer_bytes: int,
        mask_bytes: int = 0,
        checkpoint: Path | None = None,
        reference_logps: list[list[float]] | None = None,
        **details: object,
    ) -> Result:
        """All that was measured; `checkpoint` is a file or folder that is counted."""
        stamps = self._stamps
        return Result(
            method=self.job.method,
            step_seconds=[b - a for a, b in itertools.pairwise(stamps)],
            losses=self.losses,
            trained_parameters=trained_parameters,
            optimizer_bytes=optimizer_bytes,
            mask_bytes=mask_bytes,
            imports_mib=0.0 if self.device.type == "cuda" else self._imports_mib,
            peak_mib=self._peak_mib,
            checkpoint_bytes=None if checkpoint is None else bytes_of(checkpoint),
            reference_seconds=self.reference_seconds,
            reference_logps=reference_logps,
            details=details,
        )

    def _stamp(self) -> None:
        self._stamps.append(self._now())

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _read_peak(self) -> None:
        """Before a checkpoint is written: that is no part of a step."""
        if self.device.type == "cuda":
            self._peak_mib = peak_memory_mib(self.device)
            return
        self._peak.__exit__(None, None, None)
        self._peak_mib = self._peak.mib if self._peak.mib is not None else float("nan")


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in an optimiser's state."""
    return tensor_bytes(v for state in optimizer.state.values() for v in state.values())


def tensor_bytes(values: Iterable[object]) -> int:
    """Bytes of those of the values that are tensors."""
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def bytes_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)
