"""The gradient of a weight at its selected entries, and nowhere else."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_align_kernels import dispatch
from lit_align_kernels.entries import Entries
from lit_align_kernels.masked_weight_grad import reference
from lit_align_kernels.masked_weight_grad.reference import gather_block

__all__ = ["gather_block", "masked_weight_grad"]

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def masked_weight_grad(
    a: Tensor,
    b: Tensor,
    entries: Entries,
    *,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """The selected entries of `aᵀ b`, in fp32.

    For `y = x Wᵀ` (nn.Linear) the gradient of W is `dYᵀ X`: a = dY, b = X. For `y = x W` (Conv1D)
    it is `Xᵀ dY`: a = X, b = dY.

    In Triton a tile of the product without a selected entry is not computed, and what is not
    selected is never stored; sums are fp32, and fp32 factors are multiplied as
    `torch.set_float32_matmul_precision` says. A factor whose rows do not begin at multiples of 16
    bytes is copied once: pad the rows of large ones. In torch, `rows` computes the selected rows
    alone, and `elements` a block of rows at a time.

    Args:
        a: (N, P) with P the weight's first dimension; fp32, bf16 or fp16.
        b: (N, Q) with Q its second; same dtype as `a`.
        entries: selected entries of the (P, Q) weight.
        out: (M,) fp32 contiguous, to write to; without it a new tensor.
        accumulate: add to `out` what the call finds, as for one chunk of tokens after the other.

    Returns:
        (M,) fp32, in the order of `entries`: `out` where it is given. The same inputs give the
        same bits.

    Raises:
        ValueError: where shapes, dtypes or `out` do not fit the entries or one another, and where
            `accumulate` has nothing to add to; in Triton also for other dtypes.
    """
    if (a.shape[1], b.shape[1]) != tuple(entries.shape) or a.shape[0] != b.shape[0]:
        raise ValueError(
            f"a {tuple(a.shape)} and b {tuple(b.shape)} do not give a weight of {entries.shape}"
        )
    if a.dtype != b.dtype:
        raise ValueError(f"a is {a.dtype} and b {b.dtype}: give both in one dtype")
    if out is None:
        if accumulate:
            raise ValueError("accumulate adds to `out`: give it")
        out = torch.empty(entries.numel, dtype=torch.float32, device=a.device)
    elif out.shape != (entries.numel,) or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(
            f"out is {tuple(out.shape)} {out.dtype}: give ({entries.numel},) fp32, contiguous"
        )
    if dispatch.implementation_for("masked_weight_grad", a.device) == "torch":
        reference.masked_weight_grad(a, b, entries, out, accumulate)
        return out
    if a.dtype not in TRITON_DTYPES:
        raise ValueError(
            f"a and b are {a.dtype}: the kernel takes fp32, bf16 and fp16; others need "
            "LIT_ALIGN_KERNELS=torch"
        )
    from lit_align_kernels.masked_weight_grad import kernel  # not every machine has Triton

    kernel.masked_weight_grad(a, b, entries, out, accumulate)
    return out
