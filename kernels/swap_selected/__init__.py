"""Selected entries of many weights exchanged with, written from or read into values beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lit_align_kernels import dispatch
from lit_align_kernels.batches import (
    FLOATS,
    by_device,
    check_contiguous,
    check_selected,
    check_tensor,
)
from lit_align_kernels.entries import Entries
from lit_align_kernels.swap_selected import reference
from lit_align_kernels.swap_selected.reference import Operation, gather_entries, scatter_entries_

__all__ = [
    "Swap",
    "gather_entries",
    "gather_selected_",
    "scatter_entries_",
    "scatter_selected_",
    "swap_selected_",
]

Swap: TypeAlias = tuple[Tensor, Entries, Tensor]  # weight, its entries, values beside it


def swap_selected_(swaps: Sequence[Swap]) -> None:
    """Exchange the selected entries of every weight and its values, both in place.

    Swapping twice restores everything bitwise. On a GPU all of its swaps are one launch for each
    combination of dtype and kind of entries.

    Args:
        swaps: (weight, entries, values) each, of one device each. weight: any shape, fp32, bf16 or
            fp16, contiguous. entries: which of it; its index tensors on the weight's device.
            values: (M,) in the weight's dtype, contiguous, in the order of `entries`.

    Raises:
        TypeError: a tensor has another dtype; nothing has been exchanged then.
        ValueError: a shape or device does not fit, or a tensor is not contiguous; likewise.
    """
    _run("swap", swaps)


def scatter_selected_(scatters: Sequence[Swap]) -> None:
    """Write values into the selected entries of every weight, in place, cast to its dtype.

    Args:
        scatters: as for `swap_selected_`, but the values may be fp32, bf16 or fp16 anywhere. No
            entry stands in it twice.

    Raises:
        TypeError, ValueError: as for `swap_selected_`.
    """
    _run("scatter", scatters)


def gather_selected_(gathers: Sequence[Swap]) -> None:
    """Read the selected entries of every weight into its values, in place, cast to their dtype.

    Args:
        gathers: as for `scatter_selected_`.

    Raises:
        TypeError, ValueError: as for `swap_selected_`.
    """
    _run("gather", gathers)


@torch.no_grad()
def _run(operation: Operation, batch: Sequence[Swap]) -> None:
    for number, member in enumerate(batch):
        _check(number, *member, same_dtype=operation == "swap")
    for device, part in by_device(batch, lambda member: member[0].device).items():
        if dispatch.implementation_for("swap_selected", device) == "torch":
            for member in part:
                reference.OPERATIONS[operation](*member)
            continue
        from lit_align_kernels.swap_selected import kernel

        kernel.launch(part, operation)
        # Autograd does not see what a kernel writes: a graph that needs the old values must fail.
        written = [] if operation == "gather" else [weight for weight, _, _ in part]
        written += [] if operation == "scatter" else [values for _, _, values in part]
        torch.autograd.graph.increment_version(written)


def _check(number: int, weight: Tensor, entries: Entries, values: Tensor, same_dtype: bool) -> None:
    check_selected(number, weight, entries)
    dtypes = (weight.dtype,) if same_dtype else FLOATS
    check_tensor(number, "values", values, dtypes, (entries.numel,), weight.device)
    check_contiguous(number, "values", values)
