"""Whether lit-align computes what the others compute: log-probs at step 0, losses after."""

from __future__ import annotations

import dataclasses
import math

from lit_align.errors import BenchmarkError
from lit_align.pipelines.training_bench.job import Result

LOGPS_LIMIT = 1e-5
LOSSES_LIMIT = 1e-3


@dataclasses.dataclass(frozen=True)
class Proof:
    """Two full trainings with equal settings, compared.

    Attributes:
        against: the other method.
        pairs: whose chosen and rejected log-probs at step 0 were compared.
        logps_difference: the largest relative one, |ours − theirs| / |theirs|.
        steps: whose losses were compared.
        losses_difference: the largest absolute one.
        losses: lit-align's.
        other_losses: the other's.
        logps_limit: what `logps_difference` may be.
        losses_limit: what `losses_difference` may be.
    """

    against: str
    pairs: int
    logps_difference: float
    steps: int
    losses_difference: float
    losses: list[float]
    other_losses: list[float]
    logps_limit: float = LOGPS_LIMIT
    losses_limit: float = LOSSES_LIMIT

    @classmethod
    def of(cls, ours: Result, theirs: Result) -> Proof:
        """Compare two runs over the same pairs.

        Raises:
            BenchmarkError: one of them does not know its reference's log-probs, or the runs are
                not over the same pairs and steps.
        """
        a, b = ours.reference_logps, theirs.reference_logps
        if a is None or b is None or len(a) != len(b) or len(ours.losses) != len(theirs.losses):
            raise BenchmarkError(f"{ours.method} and {theirs.method} did not run on the same pairs")
        both = [(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)]
        losses = list(zip(ours.losses, theirs.losses, strict=True))
        return cls(
            against=theirs.method,
            pairs=len(a),
            logps_difference=_largest([abs(x - y) / abs(y) for x, y in both]),
            steps=len(ours.losses),
            losses_difference=_largest([abs(x - y) for x, y in losses]),
            losses=ours.losses,
            other_losses=theirs.losses,
        )

    @property
    def holds(self) -> bool:
        """Whether both differences are within their limits; NaN is not."""
        return (
            self.logps_difference <= self.logps_limit
            and self.losses_difference <= self.losses_limit
        )

    def __str__(self) -> str:
        """One line for the terminal."""
        return (
            f"against {self.against}: log-probs of {self.pairs} pairs at step 0 differ by "
            f"{self.logps_difference:.1e} (relative, at most {self.logps_limit:.0e}), losses of "
            f"{self.steps} steps by {self.losses_difference:.1e} (at most {self.losses_limit:.0e})"
        )


def _largest(differences: list[float]) -> float:
    """The largest, or NaN where there is one: `max` would pass over it."""
    return math.nan if any(map(math.isnan, differences)) else max(differences)
