"""How much masks have in common, beside what random rankings of the same sizes would.

The Jaccard index of two sets is |A ∩ B| / |A ∪ B|. Two random sets of a share k each already agree
by about k / (2 − k): 0.6 for the top 75 % of the layers, 0.053 for 10 % of the elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from lit_align.errors import MaskError
from lit_align.masks.heads import HeadLayout
from lit_align.masks.membership import DEFAULT_SHARE, Level, check_level, linear_weight_names
from lit_align.masks.membership import members as unit_members
from lit_align.masks.parameter_mask import ParameterMask

Matrix = tuple[tuple[float | None, ...], ...]
SPREAD = 12  # standard deviations around the mean; what is further out weighs less than 1e-30


@dataclass(frozen=True)
class Comparison:
    """Jaccard indices of some masks.

    Attributes:
        level: `element`, `row`, `head` or `layer`.
        names: of the masks.
        units: how many units of this level there are.
        counts: how many of them belong to each mask.
        jaccard: [i][j] of masks i and j; None where both are empty.
        random: [i][j]: the expected Jaccard of two random sets of these sizes; None on the
            diagonal and where both are empty.
        share: the least share of a unit's entries that makes it a member (elements: 1).
    """

    level: Level
    names: tuple[str, ...]
    units: int
    counts: tuple[int, ...]
    jaccard: Matrix
    random: Matrix
    share: float = 1.0


def compare_masks(
    masks: Mapping[str, ParameterMask],
    level: Level = "element",
    *,
    share: float = DEFAULT_SHARE,
    row_axes: Mapping[str, int] | None = None,
    heads: HeadLayout | None = None,
    layers: Iterable[str] | None = None,
) -> Comparison:
    """Compare two or more masks of one model.

    Args:
        masks: name for people -> mask.
        level: over which units; `lit_align.masks.membership` says when a unit belongs to a mask.
        share: for rows, heads and layers: the least share of a unit that must be selected.
        row_axes: for rows: axis of the output units by parameter name.
        heads: for heads: where they lie.
        layers: for layers: the linear weights; by default those that names and shapes tell.

    Raises:
        MaskError: fewer than two masks, masks of different models (names both), or a bad level,
            share or layout.
    """
    check_level(level, share)
    check_same_parameters(masks)
    first = next(iter(masks.values()))
    if level == "element":
        counts = {name: mask.count() for name, mask in masks.items()}
        return _comparison(level, counts, first.total(), lambda a, b: _common(masks[a], masks[b]))
    if level == "layer":
        layers = linear_weight_names(first) if layers is None else list(layers)
    if level == "row":
        row_axes = _column_axes(masks.values()) | dict(row_axes or {})
    flags = {}
    for name, mask in masks.items():
        units = unit_members(mask, level, share, row_axes=row_axes, heads=heads, layers=layers)
        if not units:
            raise MaskError(f"there is no {level} to compare over in {name}")
        flags[name] = np.concatenate(list(units.values()))
    counts = {name: int(chosen.sum()) for name, chosen in flags.items()}
    total = len(next(iter(flags.values())))
    return _comparison(level, counts, total, lambda a, b: int((flags[a] & flags[b]).sum()), share)


def check_same_parameters(masks: Mapping[str, ParameterMask]) -> None:
    """Check that there are two masks or more, all over the same parameters.

    Raises:
        MaskError: names both masks and the parameter in which they differ.
    """
    if len(masks) < 2:
        raise MaskError(f"a comparison takes two masks or more, not {len(masks)}")
    first, *others = masks
    shapes = {name: s.shape for name, s in masks[first].selections.items()}
    for other in others:
        theirs = {name: s.shape for name, s in masks[other].selections.items()}
        for name in (*shapes, *theirs):
            if shapes.get(name) != theirs.get(name):
                raise MaskError(
                    f"{first} and {other} are masks of different models: {name!r} "
                    f"{_shape_in(shapes, name, 'first')} and {_shape_in(theirs, name, 'second')}"
                )


def random_jaccard(a: int, b: int, units: int) -> float:
    """The expected Jaccard index of two random sets of `a` and `b` out of `units`, exactly.

    The size i of their intersection is hypergeometric; this is the mean of i / (a + b − i).

    >>> random_jaccard(1, 1, 4), round(random_jaccard(75, 75, 100), 4)
    (0.25, 0.6004)
    """
    if not (0 <= a <= units and 0 <= b <= units and a + b > 0):
        raise MaskError(f"two sets of {a} and {b} out of {units}: not both can be empty or larger")
    low, high = max(0, a + b - units), min(a, b)
    mean = a * b / units
    spread = math.sqrt(mean * (units - a) * (units - b)) / units if units > 1 else 0.0
    first = max(low, math.floor(mean - SPREAD * spread) - SPREAD)
    last = min(high, math.ceil(mean + SPREAD * spread) + SPREAD)
    i = np.arange(first, last + 1, dtype=np.float64)
    ratios = (a - i[:-1]) * (b - i[:-1]) / ((i[:-1] + 1) * (units - a - b + i[:-1] + 1))
    logs = np.concatenate([[0.0], np.log(ratios).cumsum()])
    weights = np.exp(logs - logs.max())
    return float((weights * i / (a + b - i)).sum() / weights.sum())


def _comparison(
    level: Level,
    counts: Mapping[str, int],
    units: int,
    common: Callable[[str, str], int],
    share: float = 1.0,
) -> Comparison:
    names = tuple(counts)
    size = len(names)
    jaccard: list[list[float | None]] = [[None] * size for _ in names]
    random: list[list[float | None]] = [[None] * size for _ in names]
    for i, a in enumerate(names):
        if counts[a]:
            jaccard[i][i] = 1.0
        for j, b in enumerate(names[:i]):
            if counts[a] + counts[b] == 0:
                continue
            both = common(a, b)
            jaccard[i][j] = jaccard[j][i] = both / (counts[a] + counts[b] - both)
            random[i][j] = random[j][i] = random_jaccard(counts[a], counts[b], units)
    return Comparison(
        level,
        names,
        units,
        tuple(counts.values()),
        tuple(map(tuple, jaccard)),
        tuple(map(tuple, random)),
        share,
    )


def _common(a: ParameterMask, b: ParameterMask) -> int:
    return sum((s & b.selections[name]).count() for name, s in a.selections.items())


def _column_axes(masks: Iterable[ParameterMask]) -> dict[str, int]:
    """Axis 1 for parameters of which any mask holds columns."""
    return {n: 1 for mask in masks for n, s in mask.selections.items() if s.axis == 1}


def _shape_in(shapes: Mapping[str, tuple[int, ...]], name: str, which: str) -> str:
    return (
        f"has shape {shapes[name]} in the {which}" if name in shapes else f"is not in the {which}"
    )
