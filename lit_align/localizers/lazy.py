"""Scores that are computed when they are read: one tensor, or a part of one, exists at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from lit_align.errors import LocalizationError
from lit_align.masks import PartialScores


class LazyScores(Mapping[str, Tensor]):
    """A mapping name -> scores that calls `compute(name)` at every read and keeps nothing.

    Args:
        names: parameter names, in the order in which ties are broken.
        compute: gives the non-negative scores of a parameter; must give the same every time.
    """

    def __init__(self, names: Iterable[str], compute: Callable[[str], Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._compute = compute

    def __getitem__(self, name: str) -> Tensor:
        """Scores of one parameter, of its shape.

        Raises:
            LocalizationError: a score is NaN or infinite; names the parameter.
        """
        if name not in self._names:
            raise KeyError(name)
        return _finite(name, self._compute(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:  # Mapping's own would compute the scores
        return name in self._names


class ElementwiseScores(LazyScores, PartialScores):
    """Scores of which every entry is computed by itself: any part of a tensor can be had alone.

    Args:
        shapes: name -> shape of the parameter, in the order in which ties are broken.
        compute: (name, start, stop) gives the non-negative scores of the flat positions
            [start, stop) of a parameter; must give the same every time.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        compute: Callable[[str, int, int], Tensor],
    ) -> None:
        super().__init__(shapes, self._whole)
        self._shapes = dict(shapes)
        self._compute_part = compute

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter."""
        return self._shapes[name]

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Scores of the flat positions [start, stop) of a parameter: (stop - start,).

        Raises:
            LocalizationError: a score is NaN or infinite; names the parameter.
        """
        return _finite(name, self._compute_part(name, start, stop))

    def _whole(self, name: str) -> Tensor:
        shape = self._shapes[name]
        return self._compute_part(name, 0, math.prod(shape)).reshape(shape)


def _finite(name: str, scores: Tensor) -> Tensor:
    if scores.numel() and not torch.isfinite(scores.max()):  # max passes NaN on
        raise LocalizationError(f"the scores of {name!r} contain NaN or infinity")
    return scores
