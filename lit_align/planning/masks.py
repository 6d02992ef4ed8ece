"""Masks to plan with: how much of every parameter is selected, in index tensors without values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from lit_align.errors import MaskError
from lit_align.masks import HeadLayout, ParameterMask, conv1d_row_axes, named_shapes
from lit_align.masks.granularity import Selection, num_rows
from lit_align.masks.linear_layers import linear_layers
from lit_align.masks.select import ceil_share
from lit_align_kernels.entries import Entries

MaskKind = Literal["full", "elements", "rows", "heads", "layers"]


@dataclasses.dataclass
class PlannedEntries(Entries):
    """Entries whose index tensors hold no values; how many lie before a row is known on the host.

    Attributes:
        before: (rows + 1,) int64: selected rows, or entries, before each row of the weight.
    """

    before: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(1, np.int64))

    def counts_before(self, rows: Sequence[int]) -> list[int]:
        """See `Entries`."""
        return self.before[np.asarray(rows)].tolist()

    def to(self, device: torch.device) -> PlannedEntries:
        """They are where the plan is."""
        return self


@dataclasses.dataclass(frozen=True)
class PlannedSelection:
    """What is selected of one parameter.

    Attributes:
        kind: none, all, rows or elements.
        shape: the parameter's.
        axis: of the rows.
        before: see `PlannedEntries`; rows are those along `axis`.
        gpu: whether the entries stand on a GPU.
    """

    kind: str
    shape: tuple[int, ...]
    axis: int = 0
    before: np.ndarray | None = None
    gpu: bool = False

    @classmethod
    def of(cls, selection: Selection) -> PlannedSelection:
        """Of a real one."""
        shape, axis = selection.shape, selection.axis
        if selection.kind not in ("rows", "elements"):
            return cls(selection.kind, shape)
        if selection.kind == "rows":
            assert selection.rows is not None
            flags = np.zeros(num_rows(shape, axis), np.int64)
            flags[selection.rows.numpy()] = 1
            return cls("rows", shape, axis, _before(flags))
        counts = selection.flags().reshape(num_rows(shape, 0), -1).sum(1, dtype=np.int64)
        return cls("elements", shape, 0, _before(counts))

    @classmethod
    def of_share(cls, shape: tuple[int, ...], ratio: float) -> PlannedSelection:
        """A share of the elements, spread evenly."""
        rows = num_rows(shape, 0) if len(shape) > 1 else 1
        total = math.prod(shape)
        count = max(1, round(ratio * total)) if total else 0
        if count in (0, total):
            return cls("all" if count else "none", shape)
        return cls("elements", shape, 0, np.arange(rows + 1) * count // rows)

    @property
    def count(self) -> int:
        """How many entries are selected."""
        if self.before is None:
            return math.prod(self.shape) if self.kind == "all" else 0
        units = int(self.before[-1])
        if self.kind == "elements":
            return units
        return units * (self.shape[0] if self.axis == 1 else self.shape[-1])

    def entries(self) -> PlannedEntries:
        """As the kernels take them; under `FakeTensorMode` without memory."""
        if self.before is None:
            return PlannedEntries("all", self.shape)
        short = self.gpu and self.kind == "elements" and math.prod(self.shape) < 2**31
        dtype = torch.int32 if short else torch.int64  # as `Entries.to` has it
        indices = torch.empty(int(self.before[-1]), dtype=dtype)
        if self.kind == "rows":
            return PlannedEntries("rows", self.shape, self.axis, indices, before=self.before)
        offsets = torch.empty(len(self.before), dtype=torch.int64)
        return PlannedEntries(
            "elements", self.shape, positions=indices, row_offsets=offsets, before=self.before
        )


class PlannedMask:
    """What `restrict` and `add_adapters` ask of a `ParameterMask`."""

    def __init__(self, selections: Mapping[str, PlannedSelection], granularity: str) -> None:
        self.selections = dict(selections)
        self.metadata = _Metadata(granularity)

    def count(self) -> int:
        """Selected entries over all parameters."""
        return sum(selection.count for selection in self.selections.values())

    def density(self) -> float:
        """Selected / all entries."""
        return self.count() / sum(math.prod(s.shape) for s in self.selections.values())

    def on_gpu(self) -> PlannedMask:
        """The same with entries on a GPU."""
        found = {n: dataclasses.replace(s, gpu=True) for n, s in self.selections.items()}
        return PlannedMask(found, self.metadata.granularity)

    def tables(self) -> list[torch.Tensor]:
        """What there is beside the entries, where single elements train.

        A bit for each entry of a weight: on a CPU the mask itself, which a run keeps; on a GPU a
        table that kernels derive, with another of 4 bytes for each row of a tile (of 128 columns).
        """
        bits = [s for s in self.selections.values() if s.kind == "elements"]
        sizes = [-(-math.prod(s.shape) // 8) for s in bits]
        sizes += [4 * math.prod(s.shape) // 128 for s in bits if s.gpu and len(s.shape) > 1]
        return [torch.empty(size, dtype=torch.uint8) for size in sizes]

    def check_matches(self, model_or_shapes: Any, base_fingerprint: str | None = None) -> None:
        """The mask was made for the model that is planned."""


@dataclasses.dataclass(frozen=True)
class _Metadata:
    granularity: str


def planned_mask(model: nn.Module, kind: MaskKind, ratio: float) -> PlannedMask:
    """A share of a model's elements, rows, heads or linear layers, spread evenly over the model.

    Raises:
        MaskError: an unknown kind, a ratio outside (0, 1], or a model without such units.
    """
    if kind not in get_args(MaskKind):
        raise MaskError(f"mask {kind!r}: choose one of {', '.join(get_args(MaskKind))}, or a file")
    if not 0 < ratio <= 1:
        raise MaskError(f"the ratio of a mask is a number in (0, 1], not {ratio}")
    shapes = named_shapes(model)
    if kind == "full":
        return PlannedMask({n: PlannedSelection("all", s) for n, s in shapes.items()}, "layer")
    if kind == "elements":
        found = {n: PlannedSelection.of_share(s, ratio) for n, s in shapes.items()}
        return PlannedMask(found, "element")
    chosen = selections(model, kind, ratio)
    return PlannedMask({n: PlannedSelection.of(s) for n, s in chosen.items()}, kind[:-1])


def selections(
    model: nn.Module, kind: Literal["rows", "heads", "layers"], ratio: float
) -> dict[str, Selection]:
    """A share of a model's rows, heads or linear layers, spread evenly, as a real mask has it."""
    real = {"rows": _rows, "heads": _heads, "layers": _layers}[kind]
    return real(model, named_shapes(model), ratio)


def planned_mask_of_file(model: nn.Module, path: str | Path) -> PlannedMask:
    """The mask in a file.

    Raises:
        MaskError: the file is no mask, or not of this architecture.
    """
    mask = ParameterMask.load(path)
    mask.check_matches(model)
    found = {n: PlannedSelection.of(s) for n, s in mask.selections.items()}
    return PlannedMask(found, mask.metadata.granularity)


def _rows(
    model: nn.Module, shapes: dict[str, tuple[int, ...]], ratio: float
) -> dict[str, Selection]:
    axes = conv1d_row_axes(model)
    found = {}
    for name, shape in shapes.items():
        axis = axes.get(name, 0)
        units = shape[0] if len(shape) == 1 else num_rows(shape, axis)
        found[name] = Selection.of_rows(
            shape, torch.from_numpy(evenly(units, ceil_share(ratio, units))), axis
        )
    return found


def _heads(
    model: nn.Module, shapes: dict[str, tuple[int, ...]], ratio: float
) -> dict[str, Selection]:
    layout = HeadLayout.from_model(model)
    heads = evenly(layout.total_heads, ceil_share(ratio, layout.total_heads))
    chosen = {}
    for block in range(len(layout.blocks)):
        own = heads[heads // layout.num_heads == block] % layout.num_heads
        chosen[str(block)] = Selection.of_positions((layout.num_heads,), torch.from_numpy(own))
    return layout.expand(chosen, shapes)


def _layers(
    model: nn.Module, shapes: dict[str, tuple[int, ...]], ratio: float
) -> dict[str, Selection]:
    layers = list(linear_layers(model))
    chosen = {layers[i] for i in evenly(len(layers), ceil_share(ratio, len(layers)))}
    return {n: (Selection.all if n in chosen else Selection.none)(s) for n, s in shapes.items()}


def evenly(units: int, count: int) -> np.ndarray:
    """`count` of the numbers below `units`, spread evenly: increasing int64."""
    return np.arange(count, dtype=np.int64) * units // count


def _before(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)])
