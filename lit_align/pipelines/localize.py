"""`lit-align localize`: a mask from model folders or layer scores."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from lit_align.errors import LocalizationError
from lit_align.language_model import fingerprint, resolve_model
from lit_align.localizers import (
    HeadDistance,
    head_distance_mask,
    magnitude_scores,
    random_scores,
    select_by_weight_change,
)
from lit_align.localizers.layer_gate import layer_gate_mask, read_scores
from lit_align.localizers.stored import meta_model, parameter_shapes
from lit_align.masks import HeadLayout, ParameterMask, conv1d_row_axes, select
from lit_align.masks.select import Granularity, Scope

LocalizeMethod: TypeAlias = Literal[
    "weight_change", "head_distance", "layer_gate", "random", "magnitude"
]


def localize(
    model: str,
    output: str,
    method: LocalizeMethod = "weight_change",
    trained: str | None = None,
    ratio: float = 0.1,
    granularity: Granularity | None = None,
    scope: Scope = "global",
    scores: str | None = None,
    lowest: bool = False,
    heads: HeadDistance | None = None,
    seed: int = 0,
) -> None:
    """A mask of key parameters from model folders, or from layer scores.

    For a mask by the gradient of a loss on data use `lit-align fit` with the callback
    `KeyParameterLocalization` (`method: gradient`).

    Args:
        model: the base: local folder, hub id or alias.
        output: file of the mask.
        method: `weight_change` (ALLO) and `head_distance` (ALPS) compare the base with `trained`,
            `layer_gate` (ILA) reads `scores`.
        trained: local folder, hub id or alias of the model after training, in fp32.
        ratio: share of the units to select.
        granularity: element, row, head or layer; default element, head for `head_distance`, layer
            for `layer_gate`.
        scope: rank all units together, or inside each parameter.
        scores: for `layer_gate`: file of layer scores.
        lowest: for `layer_gate`: take the layers with the smallest scores.
        heads: for `head_distance`: how heads are compared, and whether other weights train.
        seed: for `random`.
    """
    own = {"head_distance": "head", "layer_gate": "layer"}.get(method)
    if own is not None and (granularity not in (None, own) or scope != "global"):
        raise LocalizationError(f"method {method} ranks all {own}s: no other granularity or scope")
    _check_given(method, trained=trained, scores=scores)
    if heads is not None and method != "head_distance":
        raise LocalizationError(f"method {method} takes no --heads")
    if lowest and method != "layer_gate":
        raise LocalizationError(f"method {method} takes no --lowest")
    folder = resolve_model(model)
    if method == "head_distance":
        settings = heads or HeadDistance()
        mask = head_distance_mask(folder, resolve_model(str(trained)), ratio, **vars(settings))
    elif method == "layer_gate":
        found, known = read_scores(str(scores)), parameter_shapes(folder)
        mask = layer_gate_mask(
            found, known, ratio, lowest=lowest, base_fingerprint=fingerprint(folder)
        )
    else:
        mask = _select_units(model, method, trained, ratio, granularity or "element", scope, seed)
    mask.save(output)
    print(f"{mask}: {output}")


def _check_given(method: str, **files: str | None) -> None:
    """Each method that reads a file needs it, and no other takes it."""
    needed = {"weight_change": "trained", "head_distance": "trained", "layer_gate": "scores"}
    for name, value in files.items():
        if (needed.get(method) == name) != (value is not None):
            verb = "needs" if value is None else "takes no"
            raise LocalizationError(f"method {method} {verb} --{name}")


def _select_units(
    model: str,
    method: str,
    trained: str | None,
    ratio: float,
    granularity: Granularity,
    scope: Scope,
    seed: int,
) -> ParameterMask:
    folder = resolve_model(model)
    base = meta_model(folder)
    settings: dict[str, Any] = {
        "scope": scope,
        "granularity": granularity,
        "row_axes": conv1d_row_axes(base),
        "heads": HeadLayout.from_model(base) if granularity == "head" else None,
        "base_fingerprint": fingerprint(folder),
    }
    if method == "weight_change":
        return select_by_weight_change(folder, resolve_model(str(trained)), ratio, **settings)
    scores = random_scores(base, seed) if method == "random" else magnitude_scores(folder)
    return select(scores, ratio, method=method, **settings)
