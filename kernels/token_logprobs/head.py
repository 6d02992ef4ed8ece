"""A language model's head, as the operations that work on its logits see it."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from lit_align_kernels.entries import Entries


@dataclasses.dataclass
class WeightHandle:
    """A head's weight together with the trainable entries that stand for it.

    Attributes:
        weight: (V, D), frozen.
        selected: (M,) fp32, the Parameter that receives the gradient.
        entries: which entries of the weight `selected` holds.
        bias: (V,) or None.
    """

    weight: Tensor
    selected: Tensor | None = None
    entries: Entries | None = None
    bias: Tensor | None = None


def handle_of(weight: Tensor | WeightHandle, bias: Tensor | None) -> WeightHandle:
    """The handle of a head that is given as a weight or as a handle.

    Raises:
        ValueError: a bias is given beside a handle.
    """
    if isinstance(weight, WeightHandle):
        if bias is not None:
            raise ValueError("a WeightHandle brings its own bias: give none beside it")
        return weight
    return WeightHandle(weight, bias=bias)


def check_inputs(
    hidden: Tensor, handle: WeightHandle, targets: Tensor, ignore_index: int | None = None
) -> None:
    """Check shapes, and the targets' range (not on a GPU, where it would wait for the device).

    Raises:
        ValueError: names what does not fit.
    """
    weight, bias = handle.weight, handle.bias
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} does not fit head {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} does not fit head {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} do not fit hidden {tuple(hidden.shape)}")
    if targets.device.type != "cpu":
        return
    counted = targets if ignore_index is None else targets[targets != ignore_index]
    if counted.numel():
        low, high = int(counted.min()), int(counted.max())
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(f"targets in [{low}, {high}], the vocabulary has {weight.shape[0]}")
