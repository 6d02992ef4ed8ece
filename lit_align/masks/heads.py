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
from lit_align.masks.units import row_sums


@dataclasses.dataclass(frozen=True)
class Projection:
    """Where the rows of all heads of q, k or v begin in one parameter."""

    name: str
    axis: int = 0
    start: int = 0


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
    blocks: tuple[tuple[Projection, Projection, Projection], ...]

    @classmethod
    def from_model(cls, model: nn.Module) -> HeadLayout:
        """Of a model with `q_proj`, `k_proj`, `v_proj` (Llama and kin) or `c_attn` (GPT-2).

        Raises:
            MaskError: no such attention, or its shapes are not what the config says.
        """
        config: Any = model.config
        num_heads: int = config.num_attention_heads
        num_kv_heads: int = getattr(config, "num_key_value_heads", None) or num_heads
        head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        q_rows, kv_rows = num_heads * head_dim, num_kv_heads * head_dim
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        blocks = []
        for path, _ in model.named_modules():
            names = [f"{path}.{letter}_proj.weight" for letter in "qkv"]
            fused = f"{path}.c_attn.weight"
            if all(name in shapes for name in names):
                found = [shapes[name][0] for name in names]
                _check_rows(path, found, [q_rows, kv_rows, kv_rows])
                q, k, v = (Projection(name) for name in names)
                blocks.append((q, k, v))
            elif fused in shapes:
                _check_rows(path, [shapes[fused][1]], [q_rows + 2 * kv_rows])
                starts = (0, q_rows, q_rows + kv_rows)
                q, k, v = (Projection(fused, 1, start) for start in starts)
                blocks.append((q, k, v))
        if not blocks:
            raise MaskError(
                f"{type(model).__name__} has neither q_proj, k_proj and v_proj nor c_attn: its "
                "attention heads cannot be found"
            )
        return cls(num_heads, num_kv_heads, head_dim, tuple(blocks))

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
                selected = np.flatnonzero(np.repeat(units, self.head_dim)) + projection.start
                rows.setdefault(projection.name, []).append(selected)
                axes[projection.name] = projection.axis
        selections = {name: Selection.none(shape) for name, shape in shapes.items()}
        for name, parts in rows.items():
            joined = torch.from_numpy(np.sort(np.concatenate(parts)))
            selections[name] = Selection.of_rows(shapes[name], joined, axes[name])
        return selections


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
        tensor = scores[name]
        shapes[name] = tuple(tensor.shape)
        if name in axes:
            sums[name] = row_sums(name, tensor, axes[name])
            lengths[name] = tensor.shape[1 - axes[name]]
    for name in axes:
        if name not in sums:
            raise MaskError(f"the scores lack {name!r}, which holds attention heads")
    means = {}
    for index, projections in enumerate(layout.blocks):
        total = torch.zeros(layout.num_heads, dtype=torch.float64)
        for projection, heads in zip(
            projections, (layout.num_heads, *2 * (layout.num_kv_heads,)), strict=True
        ):
            rows = sums[projection.name].narrow(0, projection.start, heads * layout.head_dim)
            per_head = rows.reshape(heads, layout.head_dim).sum(1)
            total += per_head.repeat_interleave(layout.num_heads // heads)
        entries = sum(layout.head_dim * lengths[p.name] for p in projections)
        means[str(index)] = total / entries
    return HeadScores(layout, means, shapes)


def _check_rows(path: str, found: list[int], expected: list[int]) -> None:
    if found != expected:
        raise MaskError(f"{path}: q, k and v have {found} rows, its config says {expected}")
