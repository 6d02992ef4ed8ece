"""Checks of what an operation on many parameters gets, and its parts by device.

Kernels take bare addresses: a tensor of another length, dtype or device would be read, or written,
past its end. All of this is known without its contents, so that nothing waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from lit_align_kernels.entries import Entries

Item = TypeVar("Item")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def by_device(
    batch: Iterable[Item], device_of: Callable[[Item], torch.device]
) -> dict[torch.device, list[Item]]:
    """The batch's members by device, in their order: a model may lie on several GPUs."""
    found: dict[torch.device, list[Item]] = {}
    for item in batch:
        found.setdefault(device_of(item), []).append(item)
    return found


def check_tensor(
    number: int,
    name: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    device: torch.device,
) -> None:
    """Compare one tensor of member `number` of a batch with what it must be.

    Raises:
        TypeError: it has another dtype.
        ValueError: it has another shape, or is on another device.
    """
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"number {number} of the batch: {name} must be {names}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(
            f"number {number} of the batch: {name} must have the shape {tuple(shape)}, got "
            f"{tuple(tensor.shape)}"
        )
    if tensor.device != device:
        raise ValueError(
            f"number {number} of the batch: {name} must be on {device}, is on {tensor.device}"
        )


def check_contiguous(number: int, name: str, tensor: Tensor) -> None:
    """Refuse a tensor with gaps, or one not stored row by row, with a ValueError."""
    if not tensor.is_contiguous():
        raise ValueError(f"number {number} of the batch: {name} must be contiguous")


def check_selected(number: int, weight: Tensor, entries: Entries) -> None:
    """The weight of member `number` of a batch, and the tensors that say which of it is selected.

    Raises:
        TypeError: one of them has another dtype.
        ValueError: the entries are those of a weight of another shape or on another device, or one
            of the tensors is not contiguous.
    """
    if tuple(weight.shape) != tuple(entries.shape):
        raise ValueError(
            f"number {number} of the batch: weight {tuple(weight.shape)}, entries of a weight of "
            f"{tuple(entries.shape)}"
        )
    device = weight.device
    check_tensor(number, "weight", weight, FLOATS, weight.shape, device)
    check_contiguous(number, "weight", weight)
    if entries.kind == "rows" and (rows := entries.rows) is not None:
        check_tensor(number, "rows of its entries", rows, (torch.int64,), (len(rows),), device)
        check_contiguous(number, "rows of its entries", rows)
    if entries.kind == "elements" and (positions := entries.positions) is not None:
        name, integers = "positions of its entries", (torch.int32, torch.int64)
        check_tensor(number, name, positions, integers, (positions.numel(),), device)
        check_contiguous(number, name, positions)
        if (bitmap := entries.cache.get("bitmap")) is not None:
            words = (-(-weight.numel() // 32),)
            check_tensor(number, "bitmap of its entries", bitmap, (torch.int32,), words, device)
