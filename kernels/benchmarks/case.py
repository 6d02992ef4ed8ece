"""One benchmark: an operation, its inputs, who does it, and what a right answer is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Size = Literal["tiny", "small", "full"]
SIZES: tuple[Size, ...] = get_args(Size)
OURS = "lit-align"
WORST = 4.0  # a single entry may be off by this times the tolerance, as a share of the largest

Run = Callable[[Any], list[Tensor]]


class CheckFailedError(AssertionError):
    """A result is wrong: where it is ours, nothing is timed."""


def _as_they_are(name: str, before: Any, after: Any, results: list[Tensor]) -> list[Tensor]:
    return results


@dataclasses.dataclass(frozen=True)
class BenchmarkCase:
    """Implementations of one operation on equal inputs.

    Attributes:
        operation: name of the kernel.
        name: what is special about the case.
        make: seed → inputs on the device; called a few times, for inputs that rotate.
        implementations: name → function of the inputs that returns its results; ours is `OURS`.
        expected: what is compared, in fp64, from inputs that no implementation has touched.
        baseline: name of the implementation that ours is compared with.
        minimum_bytes: what has to be moved, or None where the arithmetic is what bounds it.
        flops: of matrix products, or None.
        tolerance: how far a result may be from the expected one: the norm of the difference over
            the norm of what is expected; one for all results, or one for each.
        compared: (name, inputs before, inputs after, results) → what stands beside `expected`:
            the results, unless an implementation works in place or lays them out otherwise.
        shapes: sizes for the record.
    """

    operation: str
    name: str
    make: Callable[[int], Any]
    implementations: Mapping[str, Run]
    expected: Run
    baseline: str
    minimum_bytes: int | None = None
    flops: int | None = None
    tolerance: float | Sequence[float] = 1e-5
    compared: Callable[[str, Any, Any, list[Tensor]], list[Tensor]] = _as_they_are
    shapes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def check(self) -> dict[str, str]:
        """Compare everyone's results with the expected ones.

        Returns:
            Of the implementations that are wrong or cannot run here: name → why. Ours is none.

        Raises:
            CheckFailedError: ours is wrong; names the case, the result and the error.
        """
        expected = self.expected(self.make(0))
        self._check(OURS, expected)
        left_out: dict[str, str] = {}
        for name in self.implementations:
            if name == OURS:
                continue
            try:
                self._check(name, expected)
            except Exception as error:  # whatever a compiler or another library may raise
                first_line = (str(error).strip().splitlines() or [""])[0]
                left_out[name] = f"{type(error).__name__}: {first_line}"
        return left_out

    def _check(self, name: str, expected: list[Tensor]) -> None:
        before, after = self.make(0), self.make(0)
        results = self.implementations[name](after)
        found = self.compared(name, before, after, results)
        tolerance = self.tolerance
        allowed = [tolerance] * len(expected) if isinstance(tolerance, float) else tolerance
        for i, (result, right, share) in enumerate(zip(found, expected, allowed, strict=True)):
            wrong = _difference(result, right, share)
            if wrong:
                raise CheckFailedError(
                    f"{self.operation}, {self.name}: result {i} of {name} {wrong}; it was not timed"
                )


def _difference(result: Tensor, right: Tensor, share: float) -> str | None:
    """What is wrong with `result`, or None."""
    if result.shape != right.shape:
        return f"has shape {tuple(result.shape)}, not {tuple(right.shape)}"
    if not right.numel():
        return None
    right = right.double()
    difference = result.double() - right
    error, allowed = float(difference.norm()), share * float(right.norm())
    worst, allowed_worst = float(difference.abs().max()), WORST * share * float(right.abs().max())
    if error <= allowed and worst <= allowed_worst:  # false where anything is NaN
        return None
    return (
        f"is off by {error:.3g} in norm, allowed {allowed:.3g}, "
        f"and by {worst:.3g} in one entry, allowed {allowed_worst:.3g}"
    )


def dtype_of(device: torch.device) -> torch.dtype:
    """What is timed on a device: bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def tolerance_of(dtype: torch.dtype) -> float:
    """What rounding to `dtype` in between explains, as a share of the norm.

    Products in bf16 measure 0.003 here (0.4 eps), in fp32, where sums round too, 6e-7 (5 eps).
    """
    return torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-5
