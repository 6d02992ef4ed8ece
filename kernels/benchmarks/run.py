"""Check a case, time it, and say what share of the device's ceilings was reached."""

from __future__ import annotations

import dataclasses

import torch

from lit_align_kernels.benchmarks import (
    masked_adamw,
    masked_weight_grad,
    swap_selected,
    token_logprobs,
    weighted_preference_loss,
)
from lit_align_kernels.benchmarks.case import BenchmarkCase, Size
from lit_align_kernels.benchmarks.ceilings import Ceilings
from lit_align_kernels.benchmarks.timing import median_ms, peak_extra_bytes, times_ms

MAKERS = {
    "masked_adamw": masked_adamw.cases,
    "token_logprobs": token_logprobs.cases,
    "weighted_preference_loss": weighted_preference_loss.cases,
    "masked_weight_grad": masked_weight_grad.cases,
    "swap_selected": swap_selected.cases,
}
OPERATIONS = tuple(MAKERS)
ROUNDS: dict[Size, int] = {"tiny": 3, "small": 10, "full": 15}
ROTATING = {"cuda": 4, "cpu": 2}  # inputs: on a GPU together larger than its L2


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """An implementation that was not timed.

    Attributes:
        operation: name of the kernel.
        case: name of the case.
        implementation: whose it is; never ours.
        reason: its error, or how wrong its result is.
    """

    operation: str
    case: str
    implementation: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One implementation in one case.

    Attributes:
        operation: name of the kernel.
        case: name of the case.
        implementation: who did it.
        median_ms: of one call.
        ratio: to the baseline's median; None where the baseline was left out.
        peak_extra_mib: memory beyond inputs and results, in MiB.
        gb_per_s: minimum bytes over time, or None.
        tflops: flops over time, or None.
        share_of_ceiling: of this device's copy rate (bytes) or product rate (flops), whichever
            bounds it. Above 1 where caches hold the data or a shape is faster than the ceiling's.
        baseline: what `ratio` refers to.
        shapes: sizes of the case.
    """

    operation: str
    case: str
    implementation: str
    median_ms: float
    ratio: float | None
    peak_extra_mib: float
    gb_per_s: float | None
    tflops: float | None
    share_of_ceiling: float
    baseline: str
    shapes: dict[str, int]


def cases(
    operation: str, size: Size, device: torch.device, dtype: torch.dtype | None = None
) -> list[BenchmarkCase]:
    """The cases of one operation, by default in what is timed on the device (bf16 on a GPU).

    Raises:
        ValueError: there is no such operation.
    """
    if operation not in MAKERS:
        raise ValueError(f"no kernel {operation!r}: choose from {', '.join(OPERATIONS)}")
    return MAKERS[operation](size, device, dtype)


def measure(
    case: BenchmarkCase, device: torch.device, ceilings: Ceilings, size: Size
) -> tuple[list[Measurement], list[LeftOut]]:
    """Check all results, then time the implementations that are right, alternating.

    Raises:
        CheckFailedError: our results are wrong; nothing is timed.
    """
    wrong = case.check()
    right = {name: run for name, run in case.implementations.items() if name not in wrong}
    inputs = [case.make(i) for i in range(ROTATING["cuda" if device.type == "cuda" else "cpu"])]
    timed = times_ms(right, inputs, device, ROUNDS[size])
    medians = {name: median_ms(values) for name, values in timed.items()}
    measured = [
        _measurement(case, name, medians, ceilings, peak_extra_bytes(run, inputs[0], device))
        for name, run in right.items()
    ]
    left_out = [LeftOut(case.operation, case.name, name, why) for name, why in wrong.items()]
    return measured, left_out


def _measurement(
    case: BenchmarkCase, name: str, medians: dict[str, float], ceilings: Ceilings, peak: int
) -> Measurement:
    elapsed = medians[name]
    gb_per_s = None if case.minimum_bytes is None else case.minimum_bytes / elapsed / 1e6
    tflops = None if case.flops is None else case.flops / elapsed / 1e9
    shares = (
        (gb_per_s or 0.0) / ceilings.copy_gb_per_s,
        (tflops or 0.0) / ceilings.matmul_tflops,
    )
    return Measurement(
        operation=case.operation,
        case=case.name,
        implementation=name,
        median_ms=elapsed,
        ratio=elapsed / medians[case.baseline] if case.baseline in medians else None,
        peak_extra_mib=peak / 2**20,
        gb_per_s=gb_per_s,
        tflops=tflops,
        share_of_ceiling=max(shares),
        baseline=case.baseline,
        shapes=dict(case.shapes),
    )
