"""Where q, k and v of every attention head stand in a model's parameters.

Separate projections are recognised by their names. A fused one is read only where the order of its
rows is known: CodeGen's `qkv_proj` bears the name of Phi-3's and orders it otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from lit_align.errors import MaskError

Order = Literal["stacked", "grouped"]
# Name of the fused module → the model types whose row order is known, and the axis of the rows.
# stacked: q of all heads, then k, then v. grouped: for each key-value head its q heads, k and v;
# where every head has its own k and v, that is q, k, v head by head.
FUSED: dict[str, dict[str, tuple[Order, int]]] = {
    "c_attn": {
        "gpt2": ("stacked", 1),  # a Conv1D, as OpenAI GPT's
        "openai-gpt": ("stacked", 1),
        "gpt_bigcode": ("grouped", 0),
    },
    "qkv_proj": {"phi3": ("stacked", 0)},
    "query_key_value": {
        "gpt_neox": ("grouped", 0),
        "gpt_neox_japanese": ("grouped", 0),
        "bloom": ("grouped", 0),
        "falcon": ("grouped", 0),
        "persimmon": ("grouped", 0),
    },
    "Wqkv": {"mpt": ("stacked", 0)},
}
Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Projection:
    """The rows of all heads of q, k or v in one parameter.

    Attributes:
        name: the parameter.
        axis: 0, or 1 where a row is a column (GPT-2's `Conv1D`).
        starts: first row of each head; its others follow.
    """

    name: str
    axis: int
    starts: tuple[int, ...]

    def rows(self, heads: np.ndarray, head_dim: int) -> np.ndarray:
        """Rows of some heads: (heads, head_dim)."""
        return np.asarray(self.starts)[heads, None] + np.arange(head_dim)


Block = tuple[Projection, Projection, Projection]


@dataclasses.dataclass(frozen=True)
class HeadCounts:
    """How many heads a block has, and how many rows each."""

    q: int
    kv: int
    dim: int

    @classmethod
    def of_config(cls, config: Any) -> HeadCounts:
        """As a model's config says.

        Raises:
            MaskError: the config has no attention heads, or they do not fall into groups.
        """
        num_heads = getattr(config, "num_attention_heads", None)
        if num_heads is None:
            raise MaskError(
                f"{_model_type(config)} has no attention heads: its config lacks "
                "num_attention_heads; choose elements, rows or layers"
            )
        num_kv = getattr(config, "num_key_value_heads", None)
        if num_kv is None and getattr(config, "multi_query", False):
            new_falcon = getattr(config, "new_decoder_architecture", False)
            num_kv = config.num_kv_heads if new_falcon else 1
        elif num_kv is None:
            num_kv = getattr(config, "num_kv_heads", None)
        num_kv = num_kv or num_heads
        if num_heads % num_kv:
            raise MaskError(f"{num_heads} query heads do not share {num_kv} key-value heads evenly")
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        return cls(num_heads, num_kv, head_dim)

    @property
    def rows(self) -> list[int]:
        """Rows of q, k and v."""
        return [self.q * self.dim, self.kv * self.dim, self.kv * self.dim]


def find_blocks(config: Any, shapes: Shapes) -> tuple[Block, ...]:
    """(q, k, v) of every block that has attention, in the order of the parameters.

    Args:
        config: of the model.
        shapes: parameter name -> shape.

    Raises:
        MaskError: no attention whose heads can be told apart, or shapes that contradict the config.
    """
    counts = HeadCounts.of_config(config)
    blocks = []
    for name in shapes:
        path, _, leaf = name.removesuffix(".weight").rpartition(".")
        if not name.endswith(".weight"):
            continue
        if leaf == "q_proj":
            blocks.append(_separate(path, shapes, counts))
        elif leaf in FUSED:
            blocks.append(_fused(path, leaf, _model_type(config), shapes, counts))
    if not blocks:
        raise MaskError(
            f"{_model_type(config)} has neither q_proj, k_proj and v_proj nor {', '.join(FUSED)}: "
            "its attention heads cannot be told apart; choose elements, rows or layers"
        )
    return tuple(blocks)


def _separate(path: str, shapes: Shapes, counts: HeadCounts) -> Block:
    q, k, v = (f"{path}.{letter}_proj.weight" for letter in "qkv")
    if k not in shapes or v not in shapes:
        raise MaskError(
            f"{path} has q_proj but not both k_proj and v_proj: its heads cannot be told apart"
        )
    _check_rows(path, [shapes[name][0] for name in (q, k, v)], counts.rows)
    kv_starts = _starts(0, counts.kv, counts.dim)
    return (
        Projection(q, 0, _starts(0, counts.q, counts.dim)),
        Projection(k, 0, kv_starts),
        Projection(v, 0, kv_starts),
    )


def _fused(path: str, leaf: str, model_type: str, shapes: Shapes, counts: HeadCounts) -> Block:
    if model_type not in FUSED[leaf]:
        raise MaskError(
            f"{path}: how {model_type!r} orders q, k and v in {leaf} is not known (it is of "
            f"{', '.join(FUSED[leaf])}), so its heads cannot be told apart"
        )
    order, axis = FUSED[leaf][model_type]
    name = f"{path}.{leaf}.weight"
    _check_rows(path, [shapes[name][axis]], [sum(counts.rows)])
    starts = _stacked_starts(counts) if order == "stacked" else _grouped_starts(counts)
    q, k, v = (Projection(name, axis, each) for each in starts)
    return q, k, v


def _stacked_starts(counts: HeadCounts) -> tuple[tuple[int, ...], ...]:
    q_rows, kv_rows, _ = counts.rows
    return (
        _starts(0, counts.q, counts.dim),
        _starts(q_rows, counts.kv, counts.dim),
        _starts(q_rows + kv_rows, counts.kv, counts.dim),
    )


def _grouped_starts(counts: HeadCounts) -> tuple[tuple[int, ...], ...]:
    shared = counts.q // counts.kv
    slots = np.arange(counts.kv * (shared + 2)).reshape(counts.kv, shared + 2) * counts.dim
    parts = (slots[:, :shared], slots[:, shared], slots[:, shared + 1])
    return tuple(tuple(part.ravel().tolist()) for part in parts)


def _starts(first: int, heads: int, head_dim: int) -> tuple[int, ...]:
    return tuple(range(first, first + heads * head_dim, head_dim))


def _model_type(config: Any) -> str:
    return getattr(config, "model_type", "") or type(config).__name__


def _check_rows(path: str, found: list[int], expected: list[int]) -> None:
    if found != expected:
        raise MaskError(f"{path}: q, k and v have {found} rows, its config says {expected}")
