"""What a run reports: weighted means, right across micro-batches and ranks, and throughput."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lit_align.peak_memory import peak_memory_mib

Reported = dict[str, tuple[Tensor, Tensor]]  # name → (mean, weight), both scalars


class MetricLog(nn.Module):
    """One `MeanMetric` a name; every rank has the same names, so that computing never deadlocks."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.metrics = nn.ModuleDict({name: MeanMetric(nan_strategy="disable") for name in names})

    def update(self, reported: Reported) -> None:
        """Take in one batch's values; a value of weight 0 is left out."""
        for name, (mean, weight) in reported.items():
            weight = weight.detach().float()
            self.metrics[name].update(torch.where(weight > 0, mean.detach().float(), 0.0), weight)

    def compute_and_reset(self) -> dict[str, float]:
        """Means of everything since the last call, on all ranks; names without data are absent."""
        values = {}
        for name, metric in self.metrics.items():
            if metric.update_called or torch.distributed.is_initialized():
                value = float(metric.compute())
                if not math.isnan(value):
                    values[name] = value
            metric.reset()
        return values


class Throughput:
    """Tokens and seconds since the last log, and tokens since the beginning, over all ranks."""

    def __init__(self) -> None:
        self.seen_tokens = 0
        self._tokens = 0
        self._start: float | None = None

    def start_batch(self) -> None:
        """Start the clock where it does not run."""
        if self._start is None:
            self._start = time.perf_counter()

    def add(self, tokens: int) -> None:
        """Count a batch's real tokens."""
        self._tokens += tokens

    def compute_and_reset(self, device: torch.device) -> dict[str, float]:
        """The values to log; stops the clock, so that what comes between logs is not counted."""
        seconds = time.perf_counter() - (self._start or time.perf_counter())
        tokens = _sum_over_ranks(self._tokens, device)
        self.seen_tokens += tokens
        self._start, self._tokens = None, 0
        return {
            "num_tokens": self.seen_tokens,
            "train/tokens_per_second": tokens / max(seconds, 1e-9),
            "peak_memory_mib": peak_memory_mib(device),
        }


def _sum_over_ranks(count: int, device: torch.device) -> int:
    if not torch.distributed.is_initialized():
        return count
    total = torch.tensor(count, device=device)
    torch.distributed.all_reduce(total)
    return int(total)


def masked_mean(values: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of `values` where `keep`, and how many those are (mean 0 where none)."""
    weight = keep.sum()
    return (values * keep).sum() / weight.clamp(min=1), weight


def log_everywhere(loggers: list[Any], values: dict[str, float], step: int) -> None:
    """Hand values to every logger."""
    for each in loggers:
        each.log_metrics(values, step=step)
