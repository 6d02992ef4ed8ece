"""Scores that are computed when they are read: only one tensor of them exists at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from lit_align.errors import LocalizationError


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
        scores = self._compute(name)
        if scores.numel() and not torch.isfinite(scores.max()):  # max passes NaN on
            raise LocalizationError(f"the scores of {name!r} contain NaN or infinity")
        return scores

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:  # Mapping's own would compute the scores
        return name in self._names
