"""Sets of attention heads: chosen by score or by chance, and as the mask of what they train."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lit_align.errors import LocalizationError, MaskError
from lit_align.masks.granularity import Selection
from lit_align.masks.heads import HeadLayout
from lit_align.masks.metadata import MaskMetadata
from lit_align.masks.parameter_mask import ParameterMask, Shapes, named_shapes
from lit_align.masks.select import ceil_share, describe_cuts, rank

TrainOrFreeze = Literal["train", "freeze"]
Rounding = Literal["ceil", "floor"]
Heads = Mapping[str, Sequence[int]]
"""Block index as text -> its chosen query heads."""


@dataclasses.dataclass(frozen=True)
class OtherWeights:
    """What becomes of the weights that are no part of a head.

    Attributes:
        others: everything outside attention, and the norms in it.
        o_proj: the attention's output projection; None: as `others`, since ALPS masks q, k and v
            alone (Eq. 8) and calls "w/o attn" what freezes these three.
    """

    others: TrainOrFreeze = "train"
    o_proj: TrainOrFreeze | None = None


def count_of_heads(ratio: float, total: int, rounding: Rounding = "ceil") -> int:
    """How many of all heads a ratio is: ⌈ratio · total⌉ (the paper), or ⌊⌋ (the public code).

    Raises:
        MaskError: the ratio is outside (0, 1].
        LocalizationError: rounding down leaves no head.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise MaskError(f"the ratio of a mask is a number in (0, 1], not {ratio!r}")
    if rounding == "ceil":
        return ceil_share(ratio, total)
    count = math.floor(Fraction(str(ratio)) * total)
    if count == 0:
        raise LocalizationError(
            f"{ratio} of {total} heads, rounded down, is none: raise the ratio or round up"
        )
    return count


def top_heads(
    scores: Mapping[str, Tensor], ratio: float, rounding: Rounding = "ceil"
) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """The heads with the largest scores over all blocks, ties in the order of block and head.

    Args:
        scores: block index as text -> (num_heads,).
        ratio: share of all query heads.
        rounding: of the share to a number of heads.

    Returns:
        The heads, and where the cut is, as `select` describes it.

    Raises:
        MaskError: the ratio is outside (0, 1].
        LocalizationError: a score is NaN, or no head is left.
    """
    chosen, cuts = rank(scores, "global", lambda total: count_of_heads(ratio, total, rounding))
    heads = {block: selection.positions().tolist() for block, selection in chosen.items()}
    return heads, describe_cuts(cuts, "global")


def random_heads(layout: HeadLayout, count: int, seed: int) -> dict[str, list[int]]:
    """`count` heads of all blocks, each set of them as likely as another."""
    flags = np.zeros(layout.total_heads, np.bool_)
    flags[np.random.default_rng(seed).permutation(len(flags))[:count]] = True
    blocks = flags.reshape(-1, layout.num_heads)
    return {str(i): np.flatnonzero(block).tolist() for i, block in enumerate(blocks)}


def layer_consistent_heads(layout: HeadLayout, count: int, seed: int) -> dict[str, list[int]]:
    """`count` random heads, the same number in every block, as far as the count divides.

    Where it does not, random blocks get one more, so that the budget stays that of the other sets.
    """
    generator, blocks = np.random.default_rng(seed), len(layout.blocks)
    each = np.full(blocks, count // blocks)
    each[generator.permutation(blocks)[: count % blocks]] += 1
    return {
        str(i): sorted(generator.permutation(layout.num_heads)[:n].tolist())
        for i, n in enumerate(each)
    }


def head_set_mask(
    layout: HeadLayout,
    heads: Heads,
    model_or_shapes: Shapes,
    other_weights: OtherWeights = OtherWeights(),
    *,
    method: str = "heads",
    ratio: float | None = None,
    base_fingerprint: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> ParameterMask:
    """The entries that train when, of all heads, the given ones do.

    A head's q rows are selected, and its group's k and v rows, once for all heads of the group. The
    biases of q, k and v are never selected: they would move the heads that are frozen.

    Args:
        layout: where the heads lie.
        heads: the chosen ones; a block that is not named has none.
        model_or_shapes: the model, or a mapping name -> shape.
        other_weights: whether the rest trains.
        method: for the metadata, as the following.
        ratio: asked for.
        base_fingerprint: of the model.
        extra: more to remember; `heads`, `others` and `o_proj` are added.

    Raises:
        MaskError: a block or head that the layout does not have.
    """
    shapes = named_shapes(model_or_shapes)
    selections = _rest(layout, shapes, other_weights)
    chosen = {str(i): _flags(layout, i, heads) for i in range(len(layout.blocks))}
    _check_blocks(layout, heads)
    in_heads = {p.name for block in layout.blocks for p in block}
    expanded = layout.expand(chosen, {name: shapes[name] for name in in_heads})
    described = {
        "heads": {block: sorted(int(head) for head in some) for block, some in heads.items()},
        "others": other_weights.others,
        "o_proj": other_weights.o_proj or other_weights.others,
    }
    metadata = MaskMetadata(
        method, "head", ratio, "global", base_fingerprint, extra=dict(extra or {}) | described
    )
    return ParameterMask(selections | expanded, metadata)


def attention_shares(layout: HeadLayout, mask: ParameterMask) -> dict[str, float]:
    """What a mask trains of q, k and v, as shares of the parameters: `q`, `k`, `v`, and `qkv`.

    Under shared keys and values a group's k and v train if one of its query heads does, so their
    share is larger than that of the heads.
    """
    selected, total = np.zeros(3), np.zeros(3)
    for block in layout.blocks:
        for i, projection in enumerate(block):
            selection = mask.selections[projection.name]
            heads = len(projection.starts)
            rows = projection.rows(np.arange(heads), layout.head_dim).ravel()
            per_row = selection.dense().sum(1 - projection.axis).numpy()[rows]
            selected[i] += per_row.sum()
            total[i] += len(rows) * selection.shape[1 - projection.axis]
    shares = dict(zip("qkv", (selected / total).tolist(), strict=True))
    return shares | {"qkv": float(selected.sum() / total.sum())}


def _rest(
    layout: HeadLayout, shapes: Mapping[str, tuple[int, ...]], other_weights: OtherWeights
) -> dict[str, Selection]:
    """Everything that is no part of a head: wholly selected, or not at all."""
    biases, inside = set(), []
    for block in layout.blocks:
        biases |= {f"{p.name.removesuffix('.weight')}.bias" for p in block}
        module = block[0].name.rpartition(".weight")[0].rpartition(".")[0]
        inside.append(f"{module}.")
    o_proj = other_weights.o_proj or other_weights.others
    selections = {}
    for name, shape in shapes.items():
        in_attention = len(shape) >= 2 and name.startswith(tuple(inside))
        trains = (o_proj if in_attention else other_weights.others) == "train"
        trains = trains and name not in biases
        selections[name] = Selection.all(shape) if trains else Selection.none(shape)
    return selections


def _flags(layout: HeadLayout, index: int, heads: Heads) -> Selection:
    chosen = sorted(set(heads.get(str(index), ())))
    if chosen and not 0 <= chosen[0] <= chosen[-1] < layout.num_heads:
        raise MaskError(
            f"block {index} has heads 0 to {layout.num_heads - 1}, not {chosen[0]} to {chosen[-1]}"
        )
    return Selection.of_positions((layout.num_heads,), torch.tensor(chosen, dtype=torch.int64))


def _check_blocks(layout: HeadLayout, heads: Heads) -> None:
    for block in heads:
        if block not in {str(i) for i in range(len(layout.blocks))}:
            raise MaskError(f"there is no block {block!r}: the model has {len(layout.blocks)}")
