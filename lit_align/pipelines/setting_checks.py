"""What a setting may be, found out before hours of training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from lit_align.errors import PipelineError


class Rule(NamedTuple):
    """A condition on a value, and the words for it."""

    holds: Callable[[Any], bool]
    words: str


# Those of transformers that need no settings of their own.
LR_SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)

POSITIVE = Rule(lambda x: 0 < x < math.inf, "above 0")
NOT_NEGATIVE = Rule(lambda x: 0 <= x < math.inf, "at least 0")
COUNT = Rule(lambda x: x >= 1, "at least 1")
LENGTH = Rule(lambda x: x >= 2, "at least 2: a prompt and a response need a token each")
STEPS = Rule(lambda x: x >= -1, "-1 (no limit) or more")
RATIO = Rule(lambda x: 0 < x <= 1, "in (0, 1]")
SHARE = Rule(lambda x: 0 <= x <= 1, "in [0, 1]")
FRACTION = Rule(lambda x: x is None or 0 < x < 1, "in (0, 1)")
SMOOTHING = Rule(lambda x: 0 <= x < 0.5, "in [0, 0.5)")
BETAS = Rule(lambda x: len(x) == 2 and all(0 <= b < 1 for b in x), "two numbers in [0, 1)")
SCHEDULER = Rule(lambda x: x in LR_SCHEDULERS, " | ".join(LR_SCHEDULERS))


def check(group: str, settings: object, **rules: Rule) -> None:
    """Check fields of a dataclass, each by its rule.

    Raises:
        PipelineError: names the first option that breaks its rule, as the command line calls it.
    """
    for name, rule in rules.items():
        value = getattr(settings, name)
        if not rule.holds(value):
            raise PipelineError(f"{group}.{name} is {value}; it must be {rule.words}")
