"""One benchmark: an operation, its inputs, who does it, and what a right answer is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Size = Literal["tiny", "small", "full"]
SIZES: tuple[Size, ...] = get_args(Size)
OURS = "lit-align"

Run = Callable[[Any], list[Tensor]]


class CheckFailedError(AssertionError):
    """Our result is wrong: nothing is timed."""


@dataclasses.dataclass(frozen=True)
class BenchmarkCase:
    """Implementations of one operation on equal inputs.

    Attributes:
        operation: name of the kernel.
        name: what is special about the case.
        make: seed → inputs on the device; called a few times, for inputs that rotate.
        implementations: name → function of the inputs that returns its results; ours is `OURS`.
        expected: the results in fp64, from inputs that no implementation has touched.
        baseline: name of the implementation that ours is compared with.
        minimum_bytes: what has to be moved, or None where the arithmetic is what bounds it.
        flops: of matrix products, or None.
        tolerance: how far ours may be from `expected`, as a share of its largest value.
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
    tolerance: float = 1e-5
    shapes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def check(self) -> None:
        """Compare our results with the expected ones.

        Raises:
            CheckFailedError: names the case, the result and the error.
        """
        expected = self.expected(self.make(0))
        results = self.implementations[OURS](self.make(0))
        for i, (ours, right) in enumerate(zip(results, expected, strict=True)):
            error = (ours.double() - right.double()).abs().max() if right.numel() else 0.0
            allowed = self.tolerance * max(1e-30, float(right.abs().max())) if right.numel() else 0
            if not error <= allowed:
                raise CheckFailedError(
                    f"{self.operation}, {self.name}: result {i} is off by {float(error):.3g}, "
                    f"allowed {allowed:.3g}; nothing was timed"
                )


def tolerance_of(dtype: torch.dtype) -> float:
    """What rounding in `dtype` explains, as a share of the largest value."""
    return 20 * torch.finfo(dtype).eps
