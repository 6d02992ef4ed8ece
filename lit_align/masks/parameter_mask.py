"""`ParameterMask`: which entries of which parameters of a model are selected."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from lit_align.errors import MaskError
from lit_align.masks import io, table
from lit_align.masks.granularity import Selection
from lit_align.masks.metadata import MaskMetadata, combine, complement
from lit_align.masks.packed_parts import packed_parts
from lit_align_kernels.entries import Entries

Shapes = nn.Module | Mapping[str, Any]


class ParameterMask:
    """For every parameter of a model: nothing, everything, rows, or single elements.

    Masks of the same parameters combine with `& | - ~`. Two masks are equal when they select the
    same entries, whatever their metadata and representation.

    Args:
        selections: one `Selection` a parameter, under the names of `model.named_parameters()`
            (a tied parameter once).
        metadata: where the mask comes from; its `realised_ratio` is filled in here.
    """

    def __init__(
        self, selections: Mapping[str, Selection], metadata: MaskMetadata | None = None
    ) -> None:
        self._selections = dict(selections)
        self.metadata = dataclasses.replace(
            metadata or MaskMetadata(), realised_ratio=self.density()
        )

    @classmethod
    def full(cls, model_or_shapes: Shapes, *, base_fingerprint: str | None = None) -> ParameterMask:
        """Everything of every parameter of a model, or of a mapping name -> shape."""
        shapes = named_shapes(model_or_shapes)
        metadata = MaskMetadata("full", "layer", base_fingerprint=base_fingerprint)
        return cls({name: Selection.all(shape) for name, shape in shapes.items()}, metadata)

    @classmethod
    def from_dense(
        cls, dense: Mapping[str, Tensor], metadata: MaskMetadata | None = None
    ) -> ParameterMask:
        """From bool tensors of the parameters' shapes."""
        return cls({name: Selection.of_dense(flags) for name, flags in dense.items()}, metadata)

    @classmethod
    def load(cls, path: str | Path, *, extra_prefix: str | None = None) -> ParameterMask:
        """Read a mask that `save` wrote, trusting nothing in the file.

        Args:
            path: the file.
            extra_prefix: tensors of such names are somebody else's (a delta's values).

        Raises:
            MaskError: the file is missing, damaged, truncated or contradicts itself; the message
                names the file and, where one is at fault, the parameter.
        """
        selections, metadata, digest = io.read(Path(path), extra_prefix)
        mask = cls(selections, metadata)
        if mask.digest != digest:
            raise MaskError(f"{path}: damaged: the selection is not the one that was saved")
        return mask

    def save(self, path: str | Path) -> None:
        """Write the mask (safetensors and JSON) whole or not at all.

        Raises:
            MaskError: `metadata.extra` holds something that JSON cannot.
        """
        io.write(Path(path), self.selections, self.metadata, self.digest)

    @property
    def selections(self) -> Mapping[str, Selection]:
        """The selection of every parameter, by name; read-only."""
        return MappingProxyType(self._selections)

    def dense(self, name: str) -> Tensor:
        """The selection of one parameter as a bool tensor of its shape."""
        return self._selection(name).dense()

    def entries(self, name: str) -> Entries:
        """The selection of one parameter as the kernels take it; nothing selected: MaskError."""
        return self._selection(name).entries()

    def count(self) -> int:
        """Selected entries over all parameters."""
        return sum(selection.count() for selection in self.selections.values())

    def total(self) -> int:
        """Entries of all parameters, selected or not."""
        return sum(selection.numel for selection in self.selections.values())

    def density(self) -> float:
        """Selected / all entries; 0 for a mask without entries."""
        return self.count() / self.total() if self.total() else 0.0

    def jaccard(self, other: ParameterMask) -> float:
        """|a & b| / |a | b| over single entries; 1 where both are empty."""
        common = sum((a & b).count() for a, b in self._pairs(other).values())
        union = self.count() + other.count() - common
        return common / union if union else 1.0

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the selection alone: of names, shapes and selected positions.

        It does not depend on the metadata, on the order of the parameters, nor on whether a set of
        entries is held as rows or as elements.
        """
        sha = hashlib.sha256()
        for name in sorted(self.selections):
            selection = self.selections[name]
            count = selection.count()
            sha.update(json.dumps([name, selection.shape, count]).encode() + b"\n")
            if 0 < count < selection.numel:
                for part in packed_parts(selection):
                    sha.update(part.data)
        return sha.hexdigest()

    def table(self) -> list[dict[str, Any]]:
        """One row a parameter: name, block, module, shape, selected, total, ratio."""
        return table.per_parameter(self.selections)

    def layer_table(self) -> list[dict[str, Any]]:
        """One row a block (None: outside the blocks): block, selected, total, ratio."""
        return table.per_block(self.table())

    def check_matches(self, model_or_shapes: Shapes, base_fingerprint: str | None = None) -> None:
        """Check that the mask is for this model.

        Args:
            model_or_shapes: a model before `restrict`, or a mapping name -> shape.
            base_fingerprint: of the model; compared where the mask knows its own.

        Raises:
            MaskError: names the parameter that is unknown, missing or of another shape, or both
                fingerprints.
        """
        shapes = named_shapes(model_or_shapes)
        for name, selection in self.selections.items():
            if name not in shapes:
                raise MaskError(f"the mask selects {name!r}, which the model does not have")
            if selection.shape != shapes[name]:
                raise MaskError(
                    f"{name!r} has shape {selection.shape} in the mask and {shapes[name]} in the "
                    "model"
                )
        for name in shapes:
            if name not in self.selections:
                raise MaskError(f"the mask lacks {name!r}, which the model has")
        own = self.metadata.base_fingerprint
        if None not in (own, base_fingerprint) and own != base_fingerprint:
            raise MaskError(
                f"the mask was located on a model with fingerprint {own}, this model's is "
                f"{base_fingerprint}"
            )

    def __and__(self, other: ParameterMask) -> ParameterMask:
        return self._combined(other, "&", lambda a, b: a & b)

    def __or__(self, other: ParameterMask) -> ParameterMask:
        return self._combined(other, "|", lambda a, b: a | b)

    def __sub__(self, other: ParameterMask) -> ParameterMask:
        return self._combined(other, "-", lambda a, b: a - b)

    def __invert__(self) -> ParameterMask:
        selections = {name: ~selection for name, selection in self.selections.items()}
        return ParameterMask(selections, complement(self.metadata))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ParameterMask) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return (
            f"ParameterMask({self.count():,} of {self.total():,} entries in "
            f"{len(self.selections)} parameters, {self.metadata.method})"
        )

    def _selection(self, name: str) -> Selection:
        if name not in self.selections:
            raise MaskError(f"the mask has no parameter {name!r}")
        return self.selections[name]

    def _pairs(self, other: ParameterMask) -> dict[str, tuple[Selection, Selection]]:
        other.check_matches({name: s.shape for name, s in self.selections.items()})
        return {name: (s, other.selections[name]) for name, s in self.selections.items()}

    def _combined(
        self,
        other: ParameterMask,
        symbol: str,
        operation: Callable[[Selection, Selection], Selection],
    ) -> ParameterMask:
        metadata = combine(self.metadata, other.metadata, symbol)
        pairs = self._pairs(other)
        return ParameterMask({name: operation(*pair) for name, pair in pairs.items()}, metadata)


def named_shapes(model_or_shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of a model, or of a mapping to shapes or tensors."""
    if isinstance(model_or_shapes, nn.Module):
        return {name: tuple(p.shape) for name, p in model_or_shapes.named_parameters()}
    return {name: _shape(value) for name, value in model_or_shapes.items()}


def _shape(value: Tensor | Iterable[int]) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else tuple(value)
