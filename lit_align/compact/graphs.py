"""Which autograd graphs through compact weights are unfinished.

Swapping base values in while a graph waits for its backward would spoil that backward. A graph is
finished when its gradient has arrived or when nobody holds it any more.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn


class _Graph:
    """One output of a compact module that still waits for its gradient."""

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)


_waiting: weakref.WeakSet[_Graph] = weakref.WeakSet()


def track(output: Tensor, module: nn.Module) -> Tensor:
    """Note that `output` of `module` waits for its gradient.

    (Not under torch.compile, whose graphs take no hooks, and not under no_grad.)
    """
    if torch.compiler.is_compiling() or not output.requires_grad or _inside_backward():
        return output
    graph = _Graph(module)
    _waiting.add(graph)

    def finish(_: Tensor, held: list[_Graph] = [graph]) -> None:  # noqa: B006 - the hook owns it
        held.clear()

    output.register_hook(finish)
    return output


def _inside_backward() -> bool:
    """Whether this is activation checkpointing's second forward: no gradient arrives there."""
    return torch._C._current_graph_task_id() != -1


def unfinished(model: nn.Module) -> int:
    """How many outputs of a model's compact modules still wait for their gradient."""
    modules = set(model.modules())
    return sum(graph.module() in modules for graph in _waiting)
