"""Attention heads as units of selection: where they lie, their mean scores, and back to entries.

A query head h of n, with g key-value heads, belongs to group h // (n / g) and stands for its own q
rows and its group's k and v rows (ALPS, arXiv 2505.18799, θ_h = {W_q^h, W_k^g(h), W_v^g(h)}).
Biases are no part of a head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lit_align.errors import MaskError
from lit_align.masks.granularity import Selection
from lit_align.masks.parameter_mask import named_shapes
from lit_align.masks.parts import OpenScores
from lit_align.masks.projections import Block, HeadCounts, find_blocks
from lit_align.masks.table import split_name
from lit_align.masks.units import row_sums


@dataclasses.dataclass(frozen=True)
class HeadLayout:
    """Where the attention heads of a model lie in its parameters.

    Attributes:
        num_heads: query heads of a block.
        num_kv_heads: key-value heads of a block; divides `num_heads`.
        head_dim: rows of a head in each of q, k and v.
        blocks: (q, k, v) of every block that has attention.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    blocks: tuple[Block, ...]

    @classmethod
    def from_model(cls, model: nn.Module) -> HeadLayout:
        """Of a model with `q_proj`, `k_proj` and `v_proj`, or a fused projection that is known.

        Known are those of GPT-2, Phi-3, GPT-NeoX, BLOOM, Falcon, Persimmon, MPT and GPTBigCode. The
        values of the parameters are not read: a model on the meta device will do.

        Raises:
            MaskError: no such attention, or its shapes are not what the config says.
        """
        config: Any = model.config
        return cls.from_shapes(config, named_shapes(model))

    @classmethod
    def from_shapes(cls, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> HeadLayout:
        """Of a model's config and its parameters' names and shapes; raises as `from_model` does."""
        counts = HeadCounts.of_config(config)
        return cls(counts.q, counts.kv, counts.dim, find_blocks(config, shapes))

    @property
    def total_heads(self) -> int:
        """Query heads of all blocks."""
        return self.num_heads * len(self.blocks)

    def query_heads(self, group: int) -> range:
        """The query heads that share one key-value head."""
        return range(group * self.heads_per_group, (group + 1) * self.heads_per_group)

    def block_number(self, index: int) -> int:
        """The transformer block that the attention of that index stands in."""
        number, _ = split_name(self.blocks[index][0].name)
        return index if number is None else number

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_heads // self.num_kv_heads

    def expand(
        self, chosen: Mapping[str, Selection], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Selection]:
        """From chosen query heads (block index as text -> selection) to the parameters' entries."""
        rows: dict[str, list[np.ndarray]] = {}
        axes: dict[str, int] = {}
        for index, projections in enumerate(self.blocks):
            heads = chosen[str(index)].flags()
            groups = heads.reshape(self.num_kv_heads, self.heads_per_group).any(1)
            for projection, units in zip(projections, (heads, groups, groups), strict=True):
                selected = projection.rows(np.flatnonzero(units), self.head_dim)
                rows.setdefault(projection.name, []).append(selected.ravel())
                axes[projection.name] = projection.axis
        selections = {name: Selection.none(shape) for name, shape in shapes.items()}
        for name, parts in rows.items():
            joined = torch.from_numpy(np.sort(np.concatenate(parts)))
            selections[name] = Selection.of_rows(shapes[name], joined, axes[name])
        return selections

    def chosen_heads(self, selections: Mapping[str, Selection]) -> dict[str, list[int]]:
        """Block index as text -> the query heads whose q rows are all selected.

        Raises:
            MaskError: a q projection is not in the mask, or one of another shape is.
        """
        chosen = {}
        for index, (q, _, _) in enumerate(self.blocks):
            if q.name not in selections:
                raise MaskError(f"the mask has no {q.name!r}, which holds attention heads")
            selection = selections[q.name]
            rows = q.rows(np.arange(self.num_heads), self.head_dim)
            if selection.shape[q.axis] <= rows.max():
                raise MaskError(f"{q.name!r} has shape {selection.shape} in the mask: too few rows")
            whole = selection.dense().all(1 - q.axis).numpy()
            chosen[str(index)] = np.flatnonzero(whole[rows].all(1)).tolist()
        return chosen


@dataclasses.dataclass
class HeadScores:
    """Scores of all query heads.

    Attributes:
        layout: where the heads lie.
        means: block index as text -> (num_heads,) fp64 mean score of a head's entries.
        shapes: parameter name -> shape, for all parameters that were scored.
    """

    layout: HeadLayout
    means: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]

    def expand(self, chosen: Mapping[str, Selection]) -> dict[str, Selection]:
        """From selections over heads to selections over the parameters' entries."""
        return self.layout.expand(chosen, self.shapes)


def reduce_to_heads(scores: Mapping[str, Tensor], layout: HeadLayout) -> HeadScores:
    """Mean score of every head over its q rows and its group's k and v rows.

    Raises:
        MaskError: a projection of the layout has no scores.
    """
    axes = {p.name: p.axis for projections in layout.blocks for p in projections}
    shapes, sums, lengths = {}, {}, {}
    for name in scores:
        opened = OpenScores(scores, name)
        shapes[name] = opened.shape
        if name in axes:
            sums[name] = row_sums(opened, axes[name])
            lengths[name] = opened.shape[1 - axes[name]]
    for name in axes:
        if name not in sums:
            raise MaskError(f"the scores lack {name!r}, which holds attention heads")
    means = {}
    for index, projections in enumerate(layout.blocks):
        total = torch.zeros(layout.num_heads, dtype=torch.float64)
        for projection, heads in zip(
            projections, (layout.num_heads, *2 * (layout.num_kv_heads,)), strict=True
        ):
            rows = projection.rows(np.arange(heads), layout.head_dim)
            per_head = sums[projection.name][torch.from_numpy(rows)].sum(1)
            total += per_head.repeat_interleave(layout.num_heads // heads)
        entries = sum(layout.head_dim * lengths[p.name] for p in projections)
        means[str(index)] = total / entries
    return HeadScores(layout, means, shapes)
