"""One AdamW step on selected entries, writing the new values into the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_align_kernels import dispatch
from lit_align_kernels.masked_adamw import reference
from lit_align_kernels.masked_adamw.reference import AdamWEntry

__all__ = ["AdamWEntry", "masked_adamw_"]


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
    """One AdamW step, in place, on every entry of `batch`.

    Args:
        batch: what trains, all on one device: masters and moments in fp32, gradients in fp32 or
            bf16, weights in fp32, bf16 or fp16.
        lr: learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled; acts on the selected entries alone.
        grad_scale: () fp32 on the same device, a factor on every gradient (clipping, 1 over the
            units of an accumulation window); it is read there, and nothing waits for it.
        stochastic_rounding_seed: masters may then be bf16 or fp16 (weights without masters): the
            step is computed in fp32 and rounded up or down at random, without bias. Another seed
            for every step; equal seeds give equal results.

    Raises:
        TypeError: a 16-bit master without a seed: it would drop most updates of a low learning
            rate.
    """
    if not batch:
        return
    if stochastic_rounding_seed is None and any(e.master.dtype != torch.float32 for e in batch):
        raise TypeError("masters must be fp32, or be rounded stochastically (give a seed)")
    settings: dict[str, Any] = {
        "lr": lr,
        "beta1": beta1,
        "beta2": beta2,
        "eps": eps,
        "weight_decay": weight_decay,
        "grad_scale": grad_scale,
        "stochastic_rounding_seed": stochastic_rounding_seed,
    }
    if dispatch.implementation_for("masked_adamw", batch[0].master.device) == "triton":
        from lit_align_kernels.masked_adamw import kernel

        kernel.launch(batch, **settings)
        # Autograd does not see what a kernel writes: a graph that needs the old values must fail.
        written = [t for e in batch for t in (e.master, e.weight) if t is not None]
        torch.autograd.graph.increment_version(written)
    else:
        reference.masked_adamw_(batch, **settings)
