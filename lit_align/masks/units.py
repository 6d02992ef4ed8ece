"""Rows and whole parameters as units of selection: their mean scores, and back to entries."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from lit_align.errors import LocalizationError
from lit_align.masks.granularity import Selection, num_rows
from lit_align.masks.parts import PART, OpenScores

Unit = Literal["row", "parameter"]


@dataclasses.dataclass
class UnitScores:
    """Scores of the units of every parameter.

    Attributes:
        unit: what a unit is.
        means: parameter name -> (units,) fp64 mean score of a unit's elements.
        shapes: parameter name -> the parameter's shape.
        axes: parameter name -> axis of its rows; 0 where not named.
    """

    unit: Unit
    means: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    axes: Mapping[str, int]

    def expand(self, chosen: Mapping[str, Selection]) -> dict[str, Selection]:
        """From selections over units to selections over the parameters' entries."""
        return {name: self._expand(name, selection) for name, selection in chosen.items()}

    def _expand(self, name: str, chosen: Selection) -> Selection:
        shape = self.shapes[name]
        if chosen.kind == "none":
            return Selection.none(shape)
        if chosen.kind == "all":
            return Selection.all(shape)
        return Selection.of_rows(shape, chosen.positions(), self.axes.get(name, 0))


def reduce_to_units(
    scores: Mapping[str, Tensor], unit: Unit, axes: Mapping[str, int]
) -> UnitScores:
    """Mean scores of rows or of whole parameters, reading `scores` once."""
    means, shapes = {}, {}
    for name in scores:
        opened = OpenScores(scores, name)
        shapes[name], numel = opened.shape, opened.numel
        sums = row_sums(opened, axes.get(name, 0))
        if unit == "row":
            means[name] = sums / max(numel // max(sums.numel(), 1), 1)
        else:
            means[name] = sums.sum().reshape(1) / numel if numel else sums[:0]
    return UnitScores(unit, means, shapes, axes)


def row_sums(scores: OpenScores, axis: int) -> Tensor:
    """Sum of every row of a parameter's scores, (rows,) fp64; an element of a 1-D one is a row.

    Raises:
        LocalizationError: the scores are not floats, contain NaN, or have no rows along `axis`.
    """
    name, shape = scores.name, scores.shape
    if axis not in (0, 1) or (axis == 1 and len(shape) != 2):
        raise LocalizationError(f"{name!r} of shape {shape} has no axis {axis}")
    matrix_shape = shape if len(shape) > 1 else (scores.numel, 1)
    width = matrix_shape[-1]
    sums = torch.zeros(num_rows(matrix_shape, axis), dtype=torch.float64)
    for start, part in scores.parts(max(1, PART // max(width, 1)) * width):
        matrix = part.reshape(-1, width)
        if axis == 1:
            sums += matrix.sum(0, dtype=torch.float64)
        else:
            first = start // width
            sums[first : first + len(matrix)] = matrix.sum(1, dtype=torch.float64)
    if sums.isnan().any():
        raise LocalizationError(f"the scores of {name!r} contain NaN")
    return sums


def conv1d_row_axes(model: nn.Module) -> dict[str, int]:
    """`row_axes` of `select` for a model: 1 for the weights of GPT-2's `Conv1D`."""
    from transformers.pytorch_utils import Conv1D  # here: masks alone need no transformers

    modules = model.named_modules()
    return {f"{name}.weight": 1 for name, module in modules if isinstance(module, Conv1D)}
