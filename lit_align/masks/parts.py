"""Scores a part at a time: a tensor of them may be larger than the memory."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from lit_align.errors import LocalizationError

PART = 2**18  # entries that are in memory at once; a multiple of 8: parts end on a bitmap's byte


class PartialScores(Mapping[str, Tensor]):
    """A mapping name -> scores of which parts can be read, too."""

    @abc.abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Of the scores of a parameter."""

    @abc.abstractmethod
    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Scores of the flat positions [start, stop) of a parameter: (stop - start,)."""


class OpenScores:
    """The scores of one parameter, for one pass through them.

    Args:
        scores: `PartialScores` are read part by part, any other mapping once, as a whole.
        name: of the parameter.

    Attributes:
        name: of the parameter.
        shape: of its scores.
    """

    def __init__(self, scores: Mapping[str, Tensor], name: str) -> None:
        self.name = name
        self._part: Callable[[int, int], Tensor]
        if isinstance(scores, PartialScores):
            self.shape = scores.shape(name)
            self._part = lambda start, stop: scores.part(name, start, stop)
        else:
            tensor = scores[name].detach()
            flat, self.shape = tensor.reshape(-1), tuple(tensor.shape)
            self._part = lambda start, stop: flat[start:stop]

    @property
    def numel(self) -> int:
        """How many scores there are."""
        return math.prod(self.shape)

    def parts(self, step: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """(flat start, up to `step` scores on the CPU) of all parts; `PART` scores by default.

        Raises:
            LocalizationError: the scores are not floats.
        """
        step = step or PART
        for start in range(0, self.numel, step):
            part = self._part(start, min(start + step, self.numel))
            if not part.is_floating_point():
                raise LocalizationError(f"the scores of {self.name!r} are {part.dtype}, not floats")
            yield start, part.cpu()


class OneOf(PartialScores):
    """One parameter of `PartialScores`, as scores of their own."""

    def __init__(self, scores: PartialScores, name: str) -> None:
        self._scores, self._name = scores, name

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the scores of the parameter."""
        return self._scores.shape(name)

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Scores of the flat positions [start, stop)."""
        return self._scores.part(name, start, stop)

    def __getitem__(self, name: str) -> Tensor:
        return self._scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter([self._name])

    def __len__(self) -> int:
        return 1
