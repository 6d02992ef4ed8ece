"""What `masked_adamw_` asks of its entries, whichever implementation runs."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from lit_align_kernels.batches import FLOATS, check_contiguous, check_selected, check_tensor
from lit_align_kernels.masked_adamw.reference import AdamWEntry

FP32 = (torch.float32,)


class Noted:
    """The tensors of a batch that was checked: a step with the same ones need not look again.

    Hundreds of parameters take longer to look at one by one than to step on a GPU, so all that is
    done here in every step goes through whole lists without a line of Python for each.

    Attributes:
        device: of all tensors.
        grad_addresses: of the gradients of the step in hand.
        written: the tensors that a step writes, moments aside.
        plan: what a kernel keeps for the batch.
    """

    def __init__(self, batch: list[AdamWEntry], stochastic: bool) -> None:
        self.device = batch[0].master.device
        self.written = [t for e in batch for t in (e.master, e.weight) if t is not None]
        self.plan: Any = None
        self._tensors, self._entries = _tensors(batch), [entry.entries for entry in batch]
        self._addresses = list(map(Tensor.data_ptr, self._tensors))
        self._forms = _forms(self.written)
        self._stochastic = stochastic
        grads = [entry.grad for entry in batch]
        self.grad_addresses = list(map(Tensor.data_ptr, grads))
        self._offsets = [address % 16 for address in self.grad_addresses]
        self._dtypes = [grad.dtype for grad in grads]
        self._shapes = [grad.shape for grad in grads]

    @classmethod
    def of(cls, batch: list[AdamWEntry], stochastic: bool) -> Noted | None:
        """None where devices or layouts ask for another look at every step."""
        device = batch[0].master.device
        for entry in batch:
            tensors = (entry.master, entry.grad, entry.exp_avg, entry.exp_avg_sq)
            if entry.master.device != device or not all(t.is_contiguous() for t in tensors):
                return None
        return cls(batch, stochastic)

    def holds(self, batch: list[AdamWEntry], stochastic: bool) -> bool:
        """Whether the batch is as it was, but for the gradients' values and addresses."""
        tensors = _tensors(batch)
        grads = [entry.grad for entry in batch]
        if not (
            len(tensors) == len(self._tensors)
            and len(grads) == len(self._dtypes)
            and all(map(operator.is_, tensors, self._tensors))
            and all(map(operator.is_, [e.entries for e in batch], self._entries))
            and list(map(Tensor.data_ptr, tensors)) == self._addresses
            and _forms(self.written) == self._forms  # another view of the same memory
            and stochastic == self._stochastic
            and [grad.dtype for grad in grads] == self._dtypes
            and [grad.shape for grad in grads] == self._shapes
            and all(map(Tensor.is_contiguous, grads))
            and {grad.device for grad in grads} == {self.device}
        ):
            return False
        addresses = list(map(Tensor.data_ptr, grads))
        if addresses != self.grad_addresses:
            if [address % 16 for address in addresses] != self._offsets:
                return False
            self.grad_addresses = addresses
        return True


def _tensors(batch: list[AdamWEntry]) -> list[Tensor]:
    """All but the gradients."""
    return [
        *[entry.master for entry in batch],
        *[entry.exp_avg for entry in batch],
        *[entry.exp_avg_sq for entry in batch],
        *[entry.step for entry in batch],
        *[entry.weight for entry in batch if entry.weight is not None],
    ]


def _forms(tensors: list[Tensor]) -> tuple[list[Any], ...]:
    """Dtypes, shapes and layouts: `data` may be set to another view of what lies there."""
    return (
        [tensor.dtype for tensor in tensors],
        [tensor.shape for tensor in tensors],
        list(map(Tensor.is_contiguous, tensors)),
    )


def check_batch(batch: list[AdamWEntry], stochastic: bool) -> None:
    """Every tensor of every entry; see `masked_adamw_` for what is raised.

    The first entry then notes what it is the first of, if the batch can be known again.
    """
    if not batch or (batch[0].noted is not None and batch[0].noted.holds(batch, stochastic)):
        return
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
    batch[0].noted = Noted.of(batch, stochastic)


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
