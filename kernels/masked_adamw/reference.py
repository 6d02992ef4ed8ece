"""AdamW on the selected entries of many parameters, with write-through. Plain torch.

With gradient g, moments m and v, step t, learning rate α, decay λ (decoupled):

    θ ← θ·(1 − αλ);  m ← β₁m + (1 − β₁)g;  v ← β₂v + (1 − β₂)g²
    θ ← θ − α · (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)

Only selected entries exist here, so decay cannot reach any other. Source: Loshchilov & Hutter,
Decoupled Weight Decay Regularization, algorithm 2.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lit_align_kernels.entries import Entries
from lit_align_kernels.masked_adamw.stochastic_rounding import random_bits, round_stochastically
from lit_align_kernels.swap_selected import scatter_entries_


@dataclasses.dataclass
class AdamWEntry:
    """One trainable parameter, its state, and the weight that it writes through to.

    Attributes:
        master: (M,) fp32 selected entries, or a whole fp32 parameter of any shape; bf16 or fp16
            where updates are rounded stochastically.
        grad: same shape as `master`; fp32, bf16 or fp16.
        exp_avg: first moment, same shape, fp32.
        exp_avg_sq: second moment, same shape, fp32.
        step: () fp32, number of steps taken.
        weight: the full weight that receives the new values, or None where `master` is the weight.
        entries: which entries of `weight` the master holds.
        noted: of the first entry of a batch: what a step found out about the tensors of them all
            (`checks.Noted`). Given on to the next step's, it saves that from looking again.
    """

    master: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    weight: Tensor | None = None
    entries: Entries | None = None
    noted: Any = dataclasses.field(default=None, repr=False, compare=False)


def _laid_out(entry: AdamWEntry) -> Tensor:
    """The gradient in fp32 with its master's strides: the fused kernel pairs them by memory."""
    grad, master = entry.grad, entry.master
    if grad.stride() == master.stride() and grad.dtype == torch.float32:
        return grad
    return torch.empty_like(master, dtype=torch.float32).copy_(grad)


@torch.no_grad()
def masked_adamw_(
    batch: list[AdamWEntry],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
    stochastic_rounding_seed: int | None = None,
) -> None:
    """See `lit_align_kernels.masked_adamw.masked_adamw_`."""
    masters = [e.master.float() for e in batch]  # the masters themselves where they are fp32
    adamw(
        masters,
        [_laid_out(e) for e in batch],
        [e.exp_avg for e in batch],
        [e.exp_avg_sq for e in batch],
        [],
        [e.step for e in batch],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
        # torch divides, as the scalers of mixed precision do, and leaves gradients divided.
        grad_scale=None if grad_scale is None else grad_scale.reciprocal(),
    )
    for number, (entry, new) in enumerate(zip(batch, masters, strict=True)):
        if new is not entry.master:
            assert stochastic_rounding_seed is not None
            bits = random_bits(stochastic_rounding_seed, number, new.numel(), new.device)
            dtype = entry.master.dtype
            entry.master.copy_(round_stochastically(new, dtype, bits.view(new.shape)))
        if entry.weight is not None:
            assert entry.entries is not None
            scatter_entries_(entry.weight, entry.entries, entry.master)
