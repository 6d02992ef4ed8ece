"""Exchange the selected entries of weights with values kept beside them, in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lit_align_kernels import dispatch
from lit_align_kernels.entries import Entries
from lit_align_kernels.swap_selected import reference
from lit_align_kernels.swap_selected.reference import gather_entries, scatter_entries_

__all__ = ["Swap", "gather_entries", "scatter_entries_", "swap_selected_"]

Swap: TypeAlias = tuple[Tensor, Entries, Tensor]  # weight, its entries, values to exchange


def swap_selected_(swaps: Sequence[Swap]) -> None:
    """Exchange the selected entries of every weight and its values, both in place.

    Swapping twice restores everything bitwise. On a GPU all of them are one launch for each
    combination of dtype and kind of entries.

    Args:
        swaps: (weight, entries, values) each; all of one device. weight: any shape, fp32, bf16 or
            fp16, contiguous. entries: which of it; its index tensors on the weight's device.
            values: (M,) in the weight's dtype, in the order of `entries`.

    Raises:
        ValueError: `values` has another length or dtype than the entries, or they belong to a
            weight of another shape; nothing has been exchanged then.
    """
    for weight, entries, values in swaps:
        _check(weight, entries, values)
    if not swaps:
        return
    if dispatch.implementation_for("swap_selected", swaps[0][0].device) == "triton":
        from lit_align_kernels.swap_selected import kernel

        kernel.launch(swaps)
        # Autograd does not see what a kernel writes: a graph that needs the old values must fail.
        torch.autograd.graph.increment_version([weight for weight, _, _ in swaps])
        return
    for weight, entries, values in swaps:
        reference.swap_selected_(weight, entries, values)


def _check(weight: Tensor, entries: Entries, values: Tensor) -> None:
    if tuple(weight.shape) != tuple(entries.shape):
        raise ValueError(f"weight {tuple(weight.shape)}, entries of a weight of {entries.shape}")
    if values.shape != (entries.numel,) or values.dtype != weight.dtype:
        raise ValueError(
            f"values must be ({entries.numel},) {weight.dtype}, got {tuple(values.shape)} "
            f"{values.dtype}"
        )
