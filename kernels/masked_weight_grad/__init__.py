"""The gradient of a weight at its selected entries, and nowhere else."""

from __future__ import annotations

from torch import Tensor

from lit_align_kernels import dispatch
from lit_align_kernels.entries import Entries
from lit_align_kernels.masked_weight_grad import reference
from lit_align_kernels.masked_weight_grad.reference import gather_block

__all__ = ["gather_block", "masked_weight_grad"]


def masked_weight_grad(a: Tensor, b: Tensor, entries: Entries) -> Tensor:
    """The selected entries of `aᵀ b`, in fp32.

    For `y = x Wᵀ` (nn.Linear) the gradient of W is `dYᵀ X`: a = dY, b = X. For `y = x W` (Conv1D)
    it is `Xᵀ dY`: a = X, b = dY.

    Args:
        a: (N, P) with P the weight's first dimension; fp32, bf16 or fp16.
        b: (N, Q) with Q its second; same dtype as `a`.
        entries: selected entries of the (P, Q) weight. For `rows` the unselected part of the
            product is never computed; for `elements` a block of rows exists at a time.

    Returns:
        (M,) fp32, in the order of `entries`.

    Raises:
        ValueError: where the shapes do not fit the entries.
    """
    if (a.shape[1], b.shape[1]) != tuple(entries.shape) or a.shape[0] != b.shape[0]:
        raise ValueError(
            f"a {tuple(a.shape)} and b {tuple(b.shape)} do not give a weight of {entries.shape}"
        )
    dispatch.implementation_for("masked_weight_grad", a.device)
    return reference.masked_weight_grad(a, b, entries)
