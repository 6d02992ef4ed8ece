"""Which rows, heads and layers belong to a mask: what masks of different kinds are compared over.

A unit belongs to a mask when at least `share` of its entries are selected:

- row: an output unit as `select` knows it, an element of a 1-D parameter being its own row;
- head: at least `share` of its q entries, of its group's k entries and of its group's v entries,
  each by itself. Under grouped queries a head's k and v rows are selected with every other head of
  its group, so a share of all three together would count heads that nobody chose;
- layer: a linear weight (`linear_layers`); norms, biases and an untied embedding are no units.

So a mask of rows, heads or layers gives back the units that it was made of, whatever the share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, get_args

import numpy as np

from lit_align.errors import MaskError
from lit_align.masks.bitmap import Flags
from lit_align.masks.granularity import Selection, num_rows
from lit_align.masks.heads import HeadLayout
from lit_align.masks.parameter_mask import ParameterMask
from lit_align.masks.projections import Projection
from lit_align.masks.select import ceil_share
from lit_align.masks.table import split_name

Level = Literal["element", "row", "head", "layer"]
DEFAULT_SHARE = 0.5
POSITIONS = ("wpe", "position")  # in the names of embeddings of positions


def members(
    mask: ParameterMask,
    level: Literal["row", "head", "layer"],
    share: float = DEFAULT_SHARE,
    *,
    row_axes: Mapping[str, int] | None = None,
    heads: HeadLayout | None = None,
    layers: Iterable[str] | None = None,
) -> dict[str, Flags]:
    """The units that belong to a mask.

    Args:
        mask: of any granularity.
        level: the kind of unit.
        share: in (0, 1]: the least share of a unit's entries that must be selected.
        row_axes: for rows: 1 where the output units are columns (GPT-2's `Conv1D`); where not
            named, the axis of the mask's own rows, else 0.
        heads: for heads: where they lie.
        layers: for layers: the names of the linear weights; else `linear_weight_names`.

    Returns:
        Parameter name (heads: block index as text) -> (units,) flags; a layer has one unit.

    Raises:
        MaskError: no such level, a share outside (0, 1], no head layout, or a name that the mask
            does not have.
    """
    check_level(level, share)
    if level == "head":
        return _head_flags(head_shares(mask, required(heads)), share)
    selections = mask.selections
    if level == "row":
        axes = row_axes or {}
        return {n: _row_flags(s, axes.get(n, s.axis), share) for n, s in selections.items()}
    names = linear_weight_names(mask) if layers is None else list(layers)
    return {n: np.array([_belongs(_selection(mask, n), share)]) for n in names}


def check_level(level: str, share: float) -> None:
    """Refuse a level that does not exist and a share that means nothing."""
    if level not in get_args(Level):
        raise MaskError(f"masks are compared by one of {get_args(Level)}, not {level!r}")
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise MaskError(f"the share of a unit is a number in (0, 1], not {share!r}")


def required(heads: HeadLayout | None) -> HeadLayout:
    """The layout; None is an error that says where to get one."""
    if heads is None:
        raise MaskError(
            "heads are found by the layout of a model: heads=HeadLayout.from_model(model), or "
            "--model on the command line"
        )
    return heads


def head_shares(mask: ParameterMask, heads: HeadLayout) -> dict[str, np.ndarray]:
    """How far every query head is selected: the least of the shares of its q, k and v entries.

    Returns:
        Block index as text -> (num_heads,) fp64 in [0, 1].

    Raises:
        MaskError: the mask lacks a projection of the layout, or it has too few rows.
    """
    shares = {}
    for index, projections in enumerate(heads.blocks):
        parts = [_projection_shares(mask, p, heads.head_dim) for p in projections]
        shares[str(index)] = np.min(
            [np.repeat(part, heads.num_heads // len(part)) for part in parts], axis=0
        )
    return shares


def row_densities(mask: ParameterMask) -> Iterator[np.ndarray]:
    """The selected share of every row of each weight that has two dimensions or more.

    Yields:
        (rows,) fp64 in [0, 1], a parameter at a time; a row as the mask's own rows lie, or axis 0.
    """
    for selection in mask.selections.values():
        if len(selection.shape) > 1 and selection.numel:
            counts = _row_counts(selection, selection.axis)
            yield counts / (selection.numel // len(counts))


def linear_weight_names(mask: ParameterMask) -> list[str]:
    """The linear layers of the mask's model, as far as names and shapes alone tell them.

    Weights of two dimensions: every one in a block, and of those outside the blocks, positions
    left out, the one with the most rows, the last of equals (the head, or the embedding that is
    tied to it). `linear_layers` of the model itself is exact.
    """
    inside: list[str] = []
    outside: list[str] = []
    for name, selection in mask.selections.items():
        if len(selection.shape) == 2 and name.endswith(".weight"):
            (outside if split_name(name)[0] is None else inside).append(name)
    outside = [name for name in outside if not any(word in name for word in POSITIONS)]
    if outside:
        rows = {name: mask.selections[name].shape[0] for name in outside}
        inside.append([name for name in outside if rows[name] == max(rows.values())][-1])
    return inside


def _selection(mask: ParameterMask, name: str) -> Selection:
    if name not in mask.selections:
        raise MaskError(f"the mask has no parameter {name!r}: it is of another model")
    return mask.selections[name]


def _belongs(selection: Selection, share: float) -> bool:
    return selection.numel > 0 and selection.count() >= ceil_share(share, selection.numel)


def _row_counts(selection: Selection, axis: int) -> np.ndarray:
    """Selected entries of every row, (rows,) int64."""
    if selection.kind in ("none", "all"):
        matrix = selection.shape if len(selection.shape) > 1 else (selection.numel, 1)
        full = 0 if selection.kind == "none" else selection.numel // num_rows(matrix, axis)
        return np.full(num_rows(matrix, axis) if selection.numel else 0, full)
    width = selection.shape[-1] if len(selection.shape) > 1 else 1
    flags = selection.flags().reshape(-1, width)
    return np.count_nonzero(flags, axis=1 - axis)


def _row_flags(selection: Selection, axis: int, share: float) -> Flags:
    counts = _row_counts(selection, axis)
    return counts >= ceil_share(share, selection.numel // max(len(counts), 1))


def _head_flags(shares: Mapping[str, np.ndarray], share: float) -> dict[str, Flags]:
    # Shares are quotients of integers below 2^53, `share` a decimal: compare without its last bit.
    return {block: values >= share * (1 - 1e-12) for block, values in shares.items()}


def _projection_shares(mask: ParameterMask, projection: Projection, head_dim: int) -> np.ndarray:
    """The selected share of each head's rows in q, k or v, (heads,) fp64."""
    selection = _selection(mask, projection.name)
    counts = _row_counts(selection, projection.axis)
    rows = projection.rows(np.arange(len(projection.starts)), head_dim)
    if len(selection.shape) != 2 or rows.max() >= len(counts):
        raise MaskError(
            f"{projection.name!r} has shape {selection.shape} in the mask, too small for "
            f"{len(rows)} heads of {head_dim}: it is of another model"
        )
    return counts[rows].sum(1) / (head_dim * selection.shape[1 - projection.axis])
