"""What `masked_adamw_` asks of its entries, whichever implementation runs."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_align_kernels.batches import FLOATS, check_contiguous, check_selected, check_tensor
from lit_align_kernels.masked_adamw.reference import AdamWEntry

FP32 = (torch.float32,)


def check_batch(batch: list[AdamWEntry], stochastic: bool) -> None:
    """Every tensor of every entry; see `masked_adamw_` for what is raised."""
    for number, entry in enumerate(batch):
        master = entry.master
        if master.dtype != torch.float32 and not stochastic:
            raise TypeError(
                f"number {number} of the batch: masters must be fp32, or be rounded "
                f"stochastically (give a seed), got {master.dtype}"
            )
        shape, device = master.shape, master.device
        check_tensor(number, "master", master, FLOATS, shape, device)
        check_tensor(number, "gradient", entry.grad, FLOATS, shape, device)
        check_tensor(number, "exp_avg", entry.exp_avg, FP32, shape, device)
        check_tensor(number, "exp_avg_sq", entry.exp_avg_sq, FP32, shape, device)
        check_tensor(number, "step", entry.step, FP32, (), device)
        _check_layouts(number, entry)
        if entry.weight is not None:
            _check_weight(number, entry)


def check_scale(scale: Tensor | None) -> None:
    """The factor on every gradient."""
    if scale is not None and (scale.dtype != torch.float32 or scale.numel() != 1):
        raise TypeError(f"grad_scale must be () fp32, got {tuple(scale.shape)} {scale.dtype}")


def _check_weight(number: int, entry: AdamWEntry) -> None:
    assert entry.weight is not None
    if entry.entries is None:
        raise ValueError(f"number {number} of the batch: a weight needs its entries")
    check_selected(number, entry.weight, entry.entries)
    if entry.weight.device != entry.master.device:
        raise ValueError(
            f"number {number} of the batch: weight must be on {entry.master.device}, is on "
            f"{entry.weight.device}"
        )
    if entry.master.numel() != entry.entries.numel:
        raise ValueError(
            f"number {number} of the batch: master must hold {entry.entries.numel} selected "
            f"entries, holds {entry.master.numel()}"
        )
    check_contiguous(number, "master", entry.master)


def _check_layouts(number: int, entry: AdamWEntry) -> None:
    """Master and moments are read and written as they lie in memory, side by side."""
    master, states = entry.master, (entry.exp_avg, entry.exp_avg_sq)
    if master.is_contiguous() and all(state.is_contiguous() for state in states):
        return
    sizes = zip(master.shape, master.stride(), strict=True)
    if master.numel() and sum((size - 1) * stride for size, stride in sizes) + 1 != master.numel():
        raise ValueError(
            f"number {number} of the batch: a master of shape {tuple(master.shape)} has gaps: "
            f"{master.stride()}"
        )
    if not all(lie_alike(state, master) for state in states):
        raise ValueError(
            f"number {number} of the batch: the moments must lie in memory as the master does"
        )


def lie_alike(tensor: Tensor, master: Tensor) -> bool:
    """Whether two tensors of one shape have their elements in the same order in memory."""
    strides = zip(tensor.stride(), master.stride(), master.shape, strict=True)
    return all(ours == theirs or size == 1 for ours, theirs, size in strides)
