"""Which autograd graphs through compact weights are unfinished.

Swapping base values in while a graph waits for its backward would spoil that backward. A graph is
finished when its gradient has arrived or when nobody holds it any more.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor


class _Graph:
    """One output of a compact module that still waits for its gradient."""


_waiting: weakref.WeakSet[_Graph] = weakref.WeakSet()


def track(output: Tensor) -> Tensor:
    """Note that `output` waits for its gradient (nothing to do under torch.compile or no_grad)."""
    if torch.compiler.is_compiling() or not output.requires_grad:
        return output
    graph = _Graph()
    _waiting.add(graph)

    def finish(_: Tensor, held: list[_Graph] = [graph]) -> None:  # noqa: B006 - the hook owns it
        held.clear()

    output.register_hook(finish)
    return output


def unfinished() -> int:
    """How many outputs of compact modules still wait for their gradient."""
    return len(_waiting)
