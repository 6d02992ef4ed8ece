"""The pictures of masks: block × module, layer × head, Jaccard matrix, densities of the rows.

Every function returns plain numbers (`HeatMap`, `Histogram`) for `write_report` and `drawing`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

import numpy as np

from lit_align.errors import MaskError
from lit_align.localizers.head_distance import SCORES
from lit_align.masks import HeadLayout, ParameterMask
from lit_align.masks.compare import Comparison
from lit_align.masks.membership import head_shares, linear_weight_names, required, row_densities
from lit_align.masks.select import ceil_share
from lit_align.masks.table import split_name
from lit_align.report.figures import OUTSIDE, HeatMap, Histogram, density_heat_map

DENSITY_BINS = 20
Picture = Literal["layers", "scores", "heads", "density"]
NO_LAYER = "Grey: no such layer. Column none: outside the blocks."


def layer_figure(
    scores_or_mask: ParameterMask | Mapping[str, float],
    title: str = "Layers",
    *,
    ratio: float | None = None,
) -> HeatMap:
    """Block × module, the form of ILA's figure 1: blocks on x, modules on y.

    Args:
        scores_or_mask: scores of linear layers by the names of their weights, or a mask. A mask of
            whole layers is drawn as selected or not, any other as densities of all parameters.
        title: what it shows.
        ratio: of scores: draw the ceil(ratio · layers) largest as selected; None: draw the ranks.

    Raises:
        MaskError: there are no scores, one is not a finite number, or the ratio is not in (0, 1].
    """
    if isinstance(scores_or_mask, ParameterMask):
        cells = _whole_layers(scores_or_mask)
        if cells is None:
            return density_heat_map(title, scores_or_mask.table())
        return _block_by_module(title, cells, scale="selected", caption=NO_LAYER)
    ranks = _ranks(scores_or_mask)
    if ratio is None:
        return _block_by_module(
            title, ranks, scale="rank", value_label="rank (1: largest score)", caption=NO_LAYER
        )
    if not 0 < ratio <= 1:
        raise MaskError(f"the ratio of the selected layers is a number in (0, 1], not {ratio!r}")
    k = ceil_share(ratio, len(ranks))
    chosen = {name: float(rank <= k) for name, rank in ranks.items()}
    caption = f"Selected: the {k} layers of {len(ranks)} with the largest scores. {NO_LAYER}"
    return _block_by_module(title, chosen, scale="selected", caption=caption)


def head_figure(
    scores_or_mask: ParameterMask | Mapping[Any, Any],
    heads: HeadLayout | None = None,
    title: str = "Attention heads",
    caption: str = "",
) -> HeatMap:
    """Layer × head: scores by block, or what a mask selects of every query head.

    Args:
        scores_or_mask: block -> (num_heads,) scores, or a mask.
        heads: of a mask: where the heads lie.
        title: what it shows.
        caption: of scores: what they are.

    Raises:
        MaskError: a mask without a layout or of another model; no scores.
    """
    if not isinstance(scores_or_mask, ParameterMask):
        rows = {str(block): tuple(map(float, row)) for block, row in scores_or_mask.items()}
        return _layer_by_head(title, rows, scale="score", value_label="score", caption=caption)
    layout = required(heads)
    names = _block_names(layout)
    shares = head_shares(scores_or_mask, layout)
    rows = {names[block]: tuple(map(float, row)) for block, row in shares.items()}
    if all(value in (0.0, 1.0) for row in rows.values() for value in row):
        return _layer_by_head(title, rows, scale="selected", value_label="selected")
    caption = "The least of the shares of a head's q, k and v entries."
    top = max(value for row in rows.values() for value in row)
    return _layer_by_head(title, rows, top=top, value_label="share selected", caption=caption)


def jaccard_figure(comparison: Comparison, title: str = "") -> HeatMap:
    """The Jaccard matrix of some masks; in brackets what random sets of these sizes have."""
    return HeatMap(
        title or f"Jaccard index, by {comparison.level}",
        comparison.names,
        comparison.names,
        comparison.jaccard,
        scale="jaccard",
        x_label="",
        value_label="Jaccard index",
        caption=f"Over {comparison.units:,} {comparison.level}s. In brackets: what two random sets "
        "of the same sizes have on average.",
        remarks=tuple(
            tuple("" if value is None else f"({value:.2f})" for value in row)
            for row in comparison.random
        ),
    )


def density_figure(mask: ParameterMask, title: str = "Density of the rows") -> Histogram:
    """How the selected share spreads over the rows of all weights."""
    edges = np.linspace(0, 1, DENSITY_BINS + 1)
    counts = np.zeros(DENSITY_BINS, np.int64)
    for densities in row_densities(mask):
        counts += np.histogram(densities, edges)[0]
    return Histogram(
        title,
        "share of a row that is selected",
        tuple(edges.tolist()),
        tuple(counts.tolist()),
        caption=f"{counts.sum():,} rows of the weights with two dimensions or more; the whole "
        f"mask selects {mask.density():.2%}. The axis of the counts is logarithmic above 1.",
        y_label="rows",
        log_x=False,
        log_y=True,
    )


def mask_figures(
    mask: ParameterMask,
    heads: HeadLayout | None = None,
    title: str = "",
    kinds: Collection[Picture] = get_args(Picture),
) -> list[HeatMap | Histogram]:
    """The pictures of one mask: block × module, layer × head where heads are given, densities.

    A mask that remembers the scores of its heads (ALPS) has a picture of these too. `title` is put
    before the name of each picture.

    Raises:
        MaskError: the scores that the mask remembers are none, or it is of another model.
    """
    before = f"{title}: " if title else ""
    figures: list[HeatMap | Histogram] = []
    if "layers" in kinds:
        figures.append(layer_figure(mask, f"{before}selected by block and module"))
    if "scores" in kinds and SCORES in mask.metadata.extra:
        names = {} if heads is None else _block_names(heads)
        scores = {names.get(block, block): row for block, row in stored_scores(mask).items()}
        figures.append(
            head_figure(
                scores, title=f"{before}scores of the attention heads", caption=_of_scores(mask)
            )
        )
    if "heads" in kinds and heads is not None:
        figures.append(head_figure(mask, heads, f"{before}selected attention heads"))
    if "density" in kinds:
        figures.append(density_figure(mask, f"{before}density of the rows"))
    return figures


def stored_scores(mask: ParameterMask) -> dict[str, list[float]]:
    """The head scores that a mask was chosen by: block index as text -> scores.

    Raises:
        MaskError: the mask remembers none, or something else under their name.
    """
    found: Any = mask.metadata.extra.get(SCORES)
    rows = list(found.values()) if isinstance(found, dict) else []
    if not rows or not all(isinstance(row, list) and all(map(_is_score, row)) for row in rows):
        raise MaskError(f"the mask's metadata hold no scores of heads under {SCORES!r}")
    return dict(found)


def _block_names(heads: HeadLayout) -> dict[str, str]:
    """Index of an attention, as text -> the number of its block, where that tells them apart."""
    numbers = [heads.block_number(i) for i in range(len(heads.blocks))]
    unique = len(set(numbers)) == len(numbers)
    return {str(i): str(number if unique else i) for i, number in enumerate(numbers)}


def _of_scores(mask: ParameterMask) -> str:
    """What the scores of the heads are, as far as the mask remembers."""
    extra = mask.metadata.extra
    if not {"metric", "representation", "tau"} <= extra.keys():
        return ""
    return (
        f"{extra['metric']} of {extra['representation']} between the base and the task model, "
        f"softmax at tau {extra['tau']}. Larger: the task moved the head further."
    )


def _is_score(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _whole_layers(mask: ParameterMask) -> dict[str, float] | None:
    """Linear layer -> 1 or 0; None where the mask selects anything but whole linear layers."""
    names = linear_weight_names(mask)
    layers = {name: mask.selections[name].kind for name in names}
    others = [s for name, s in mask.selections.items() if name not in layers]
    if any(kind not in ("all", "none") for kind in layers.values()) or any(
        s.kind != "none" for s in others
    ):
        return None
    return {name: float(kind == "all") for name, kind in layers.items()}


def _ranks(scores: Mapping[str, float]) -> dict[str, float]:
    """Layer -> 1 for the largest score, 2, ...; equals in the order of the mapping."""
    if not scores:
        raise MaskError("there are no scores to draw")
    for name, score in scores.items():
        if not math.isfinite(score):
            raise MaskError(f"the score of {name!r} is {score}")
    ordered = sorted(scores, key=lambda name: -scores[name])
    place = {name: float(i + 1) for i, name in enumerate(ordered)}
    return {name: place[name] for name in scores}


def _block_by_module(title: str, layers: Mapping[str, float], **more: Any) -> HeatMap:
    cells = {split_name(name): value for name, value in layers.items()}
    blocks = sorted({block for block, _ in cells}, key=lambda b: math.inf if b is None else b)
    modules = list(dict.fromkeys(m for block, m in cells if block is not None))
    modules += [m for block, m in cells if block is None]
    return HeatMap(
        title,
        tuple(modules),
        tuple(OUTSIDE if block is None else str(block) for block in blocks),
        tuple(tuple(cells.get((block, m)) for block in blocks) for m in modules),
        **more,
    )


def _layer_by_head(title: str, rows: Mapping[str, tuple[float, ...]], **more: Any) -> HeatMap:
    if not rows:
        raise MaskError("there are no heads to draw")
    width = max(map(len, rows.values()))
    return HeatMap(
        title,
        tuple(rows),
        tuple(str(head) for head in range(width)),
        tuple(row + (None,) * (width - len(row)) for row in rows.values()),
        x_label="query head",
        y_label="block",
        **more,
    )
