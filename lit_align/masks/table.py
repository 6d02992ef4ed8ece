"""Tables over a mask: one row a parameter, one row a transformer block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_align.masks.granularity import Selection


def split_name(name: str) -> tuple[int | None, str]:
    """The block and the module of a parameter's name.

    The block is the first number in the dotted name, and the module what follows it, without
    `.weight`:

    >>> split_name("model.layers.3.mlp.up_proj.weight")
    (3, 'mlp.up_proj')
    >>> split_name("model.embed_tokens.weight")
    (None, 'model.embed_tokens')
    """
    parts = name.removesuffix(".weight").split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isdecimal():
            return int(part), ".".join(parts[i + 1 :])
    return None, ".".join(parts)


def per_parameter(selections: Mapping[str, Selection]) -> list[dict[str, Any]]:
    """One row a parameter: name, block, module, shape, selected, total, ratio."""
    rows = []
    for name, selection in selections.items():
        block, module = split_name(name)
        row = {"name": name, "block": block, "module": module, "shape": selection.shape}
        rows.append(row | _counts(selection.count(), selection.numel))
    return rows


def per_block(parameters: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `per_parameter`, summed by block; what is outside the blocks comes first."""
    sums: dict[int | None, list[int]] = {}
    for row in parameters:
        selected_and_total = sums.setdefault(row["block"], [0, 0])
        selected_and_total[0] += row["selected"]
        selected_and_total[1] += row["total"]
    blocks = sorted(sums, key=lambda block: -1 if block is None else block)
    return [{"block": block} | _counts(*sums[block]) for block in blocks]


def _counts(selected: int, total: int) -> dict[str, Any]:
    return {"selected": selected, "total": total, "ratio": selected / total if total else 0.0}
