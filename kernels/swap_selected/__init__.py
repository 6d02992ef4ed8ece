"""Exchange the selected entries of a weight with values kept beside it, in place."""

from __future__ import annotations

from torch import Tensor

from lit_align_kernels import dispatch
from lit_align_kernels.entries import Entries
from lit_align_kernels.swap_selected import reference
from lit_align_kernels.swap_selected.reference import gather_entries, scatter_entries_

__all__ = ["gather_entries", "scatter_entries_", "swap_selected_"]


def swap_selected_(weight: Tensor, entries: Entries, values: Tensor) -> None:
    """Exchange the selected entries of `weight` and `values`, both in place.

    Args:
        weight: any shape, fp32, bf16 or fp16, contiguous.
        entries: which entries; its index tensors on the weight's device.
        values: (M,) in the weight's dtype, in the order of `entries`.

    Raises:
        ValueError: where `values` has another length or dtype than the entries, or they belong to a
            weight of another shape.
    """
    if tuple(weight.shape) != tuple(entries.shape):
        raise ValueError(f"weight {tuple(weight.shape)}, entries of a weight of {entries.shape}")
    if values.shape != (entries.numel,) or values.dtype != weight.dtype:
        raise ValueError(
            f"values must be ({entries.numel},) {weight.dtype}, got {tuple(values.shape)} "
            f"{values.dtype}"
        )
    dispatch.implementation_for("swap_selected", weight.device)
    reference.swap_selected_(weight, entries, values)
