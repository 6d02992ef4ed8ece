"""New values reach the weights whatever optimiser made them."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from lit_align.compact.state import Link, links, live_modules, module_links, write_through


def sync(model: nn.Module) -> None:
    """Write every selected entry of a restricted model into its weight (after averaging, say)."""
    write_through(links(model))


def linked(optimizer: Optimizer) -> dict[int, Link]:
    """Links of the optimiser's parameters by `id(parameter)`; wholly selected ones need none.

    They come in the order of the parameters, the same on every rank.
    """
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    wanted = set(ids)
    found: dict[int, Link] = {}
    for module in list(live_modules):
        for link in module_links(module):
            if id(link.selected) in wanted and not link.is_whole:
                found.setdefault(id(link.selected), link)
    return {i: found[i] for i in ids if i in found}


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if live_modules and not getattr(optimizer, "writes_through", False):
        write_through(linked(optimizer).values())


register_optimizer_step_post_hook(_after_step)
