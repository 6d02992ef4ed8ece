"""The reference policy without a second model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from lit_align.compact import graphs
from lit_align.compact.adapters import has_adapters, without_adapters
from lit_align.compact.state import Link, links
from lit_align.errors import TrainingError
from lit_align_kernels.swap_selected import swap_selected_


@torch.no_grad()
def _exchange(links_: list[Link]) -> None:
    swaps = []
    for link in links_:
        link.state.move_to(link.weight.device, link.weight.dtype)
        weight, entries = link.here()
        assert link.state.base is not None
        if entries.numel:  # this rank's rows may hold none
            swaps.append((weight, entries, link.state.base))
    swap_selected_(swaps)
    torch.clear_autocast_cache()  # its 16-bit copies are of the values before the exchange


def holds_reference(model: nn.Module) -> bool:
    """Whether `reference_policy` can make the model its own reference."""
    found = links(model)
    return has_adapters(model) or (
        bool(found) and all(link.state.base is not None for link in found)
    )


@contextlib.contextmanager
def reference_policy(model: nn.Module) -> Iterator[None]:
    """Base values stand in place of the selected entries inside this context; no grad is recorded.

    A model with adapters goes without them.

    Raises:
        TrainingError: where the model is not restricted, keeps no base values, or where a forward
            through compact weights still waits for its backward (the swap would spoil it): compute
            the reference's log-probs before the policy's.
    """
    if has_adapters(model):
        with torch.no_grad(), without_adapters(model):
            yield
        return
    found = links(model)
    if not holds_reference(model):
        raise TrainingError(
            "reference_policy needs a model restricted with keep_base=True; a model that trains "
            "wholly has no base values to swap in: use precomputed reference log-probs"
        )
    if waiting := graphs.unfinished(model):
        raise TrainingError(
            f"reference_policy inside an unfinished graph: {waiting} outputs of compact modules "
            "wait for their backward; run the reference's forward first"
        )
    _exchange(found)
    try:
        with torch.no_grad():
            yield
    finally:
        _exchange(found)
