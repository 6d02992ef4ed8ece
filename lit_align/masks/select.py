"""`select`: the only top-k of lit-align, from scores to a mask."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, Literal, get_args

from torch import Tensor

from lit_align.errors import LocalizationError, MaskError
from lit_align.masks.granularity import Selection
from lit_align.masks.heads import HeadLayout, HeadScores, reduce_to_heads
from lit_align.masks.metadata import MaskMetadata
from lit_align.masks.parameter_mask import ParameterMask
from lit_align.masks.parts import OneOf, PartialScores
from lit_align.masks.topk import Threshold, top_k
from lit_align.masks.units import UnitScores, reduce_to_units

Granularity = Literal["element", "row", "head", "layer"]
Scope = Literal["global", "per_parameter"]


def select(
    scores: Mapping[str, Tensor],
    ratio: float,
    scope: Scope = "global",
    *,
    granularity: Granularity = "element",
    row_axes: Mapping[str, int] | None = None,
    heads: HeadLayout | None = None,
    method: str = "scores",
    base_fingerprint: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> ParameterMask:
    """Select the units with the largest scores, exactly and without joining the tensors.

    Equal scores are taken in the order of the mapping, then of the position, so that the mask of a
    smaller ratio is a subset of the mask of a larger one. `metadata.extra` of the mask says where
    the cut is: `threshold` (the smallest selected score; per parameter: the smallest of all),
    `threshold_parameter` (whose it is; only per parameter) and `ties_at_threshold` (scores equal to
    the threshold / units selected, counted where some of the equals had to be left out).

    Args:
        scores: parameter name -> float tensor of the parameter's shape, larger = more important.
            Any mapping: it is read a few times, one tensor at a time, and may compute on reading;
            `PartialScores` are read a part of a tensor at a time.
        ratio: share of the units to select, in (0, 1]. Elements: round(ratio · total), at least 1;
            rows, heads and layers: ceil(ratio · units).
        scope: `global` ranks all units together, `per_parameter` inside each parameter (heads:
            inside each block).
        granularity: the unit: single elements, rows, attention heads, or whole parameters
            (`layer`); a row, head or layer is scored by the mean of its elements. A head selects
            its q rows and its group's k and v rows, nothing outside attention.
        row_axes: for rows: axis of the output units by parameter name, 0 where not named; 1 for
            GPT-2's `Conv1D` (`conv1d_row_axes` finds them).
        heads: for heads: where they lie.
        method: for the metadata: where the scores come from.
        base_fingerprint: for the metadata: of the model that was scored.
        extra: for the metadata: more to remember; must fit JSON.

    Raises:
        MaskError: a ratio outside (0, 1], an unknown scope or granularity, or no head layout.
        LocalizationError: a score is NaN or not a float (names the parameter), or there are none.
    """
    _check_arguments(ratio, scope, granularity)
    if granularity == "element":
        selections, cuts = rank(scores, scope, lambda total: max(1, round(ratio * total)))
    else:
        units = _reduce(scores, granularity, row_axes, heads)
        chosen, cuts = rank(units.means, scope, lambda total: ceil_share(ratio, total))
        selections = units.expand(chosen)
    metadata = MaskMetadata(
        method=method,
        granularity=granularity,
        ratio=ratio,
        scope=scope,
        base_fingerprint=base_fingerprint,
        extra=dict(extra or {}) | describe_cuts(cuts, scope),
    )
    return ParameterMask(selections, metadata)


def _reduce(
    scores: Mapping[str, Tensor],
    granularity: Granularity,
    row_axes: Mapping[str, int] | None,
    heads: HeadLayout | None,
) -> UnitScores | HeadScores:
    if granularity == "head":
        if heads is None:
            raise MaskError("heads are selected by a layout: heads=HeadLayout.from_model(model)")
        return reduce_to_heads(scores, heads)
    return reduce_to_units(scores, "row" if granularity == "row" else "parameter", row_axes or {})


def ceil_share(ratio: float, total: int) -> int:
    """ceil(ratio · total) with the ratio taken as the decimal it is written as.

    >>> ceil_share(0.07, 100), math.ceil(0.07 * 100)
    (7, 8)
    """
    return math.ceil(Fraction(str(ratio)) * total)


def rank(
    scores: Mapping[str, Tensor], scope: Scope, k_of_total: Callable[[int], int]
) -> tuple[dict[str, Selection], dict[str, Threshold]]:
    """The best of some scores: a selection a tensor, and the cut a tensor (`""`: of all)."""
    if scope == "global":
        selections, cut = top_k(scores, k_of_total)
        return selections, {"": cut}
    selections, cuts = {}, {}
    for name in scores:
        if isinstance(scores, PartialScores):
            one: Mapping[str, Tensor] = OneOf(scores, name)
            shape = scores.shape(name)
        else:
            one = {name: scores[name]}
            shape = tuple(one[name].shape)
        if math.prod(shape) == 0:
            selections[name] = Selection.none(shape)
            continue
        chosen, cuts[name] = top_k(one, k_of_total)
        selections |= chosen
    if not cuts:
        raise LocalizationError("there are no scores to select from")
    return selections, cuts


def describe_cuts(cuts: Mapping[str, Threshold], scope: Scope) -> dict[str, Any]:
    """What `metadata.extra` says of where the cut is."""
    lowest = min(cuts, key=lambda name: cuts[name].value)
    value = cuts[lowest].value
    taken = sum(cut.k for cut in cuts.values())
    described = {
        "threshold": value if math.isfinite(value) else str(value),  # JSON has no infinity
        "ties_at_threshold": sum(cut.undecided for cut in cuts.values()) / taken,
    }
    return described | ({} if scope == "global" else {"threshold_parameter": lowest})


def _check_arguments(ratio: float, scope: str, granularity: str) -> None:
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise MaskError(f"the ratio of a mask is a number in (0, 1], not {ratio!r}")
    if scope not in get_args(Scope):
        raise MaskError(f"the scope is one of {get_args(Scope)}, not {scope!r}")
    if granularity not in get_args(Granularity):
        raise MaskError(f"the granularity is one of {get_args(Granularity)}, not {granularity!r}")
    if granularity == "layer" and scope == "per_parameter":
        raise MaskError("a layer is a whole parameter: it cannot be ranked inside a parameter")
