"""What a run reports: weighted means, right across micro-batches and ranks, and throughput."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_align.peak_memory import peak_memory_mib

Reported = dict[str, tuple[Tensor, Tensor]]  # name → (mean, weight), both scalars


class MetricLog(Metric):
    """A weighted mean for each name; all ranks have the same names, so that computing never hangs.

    (`MeanMetric(nan_strategy="disable")` of torchmetrics 1.9 forgets its weights, and its other
    strategies wait for the device at every update.)
    """

    full_state_update = False
    sums: Tensor
    weights: Tensor

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        for state in ("sums", "weights"):
            self.add_state(state, torch.zeros(len(names)), dist_reduce_fx="sum")

    def update(self, reported: Reported) -> None:
        """Take in one batch's values; a value of weight 0 is left out."""
        sums, weights = torch.zeros_like(self.sums), torch.zeros_like(self.weights)
        for name, (mean, weight) in reported.items():
            at, weight = self.names.index(name), weight.detach().float()
            weights[at] = weight
            sums[at] = torch.where(weight > 0, mean.detach().float() * weight, 0.0)
        # Out of place: what validation's inference mode has made must not be written to outside it.
        self.sums, self.weights = self.sums + sums, self.weights + weights

    def compute(self) -> dict[str, float]:
        """Means of everything since the last reset, on all ranks; names without data are absent."""
        means = (self.sums / self.weights).tolist()
        return {name: m for name, m in zip(self.names, means, strict=True) if not math.isnan(m)}

    def compute_and_reset(self) -> dict[str, float]:
        """The means, and a new beginning."""
        values = self.compute()
        self.reset()
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

    def tokens_since_log(self, device: torch.device) -> int:
        """Tokens that `seen_tokens` does not hold yet, over all ranks."""
        return _sum_over_ranks(self._tokens, device)

    def compute_and_reset(self, device: torch.device) -> dict[str, float]:
        """The values to log; stops the clock, so that what comes between logs is not counted."""
        seconds = time.perf_counter() - (self._start or time.perf_counter())
        tokens = self.tokens_since_log(device)
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
