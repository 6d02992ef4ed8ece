"""One AdamW step on selected entries, writing the new values into the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_align_kernels import dispatch
from lit_align_kernels.batches import by_device
from lit_align_kernels.masked_adamw import checks, reference
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
        batch: what trains; all of one entry is on one device. Masters, moments and step counts in
            fp32, gradients and weights in fp32, bf16 or fp16. Layouts: weights and their masters
            contiguous; other masters dense, and their moments like them.
        lr: learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled; acts on the selected entries alone.
        grad_scale: () fp32, a factor on every gradient (clipping, 1 over the units of an
            accumulation window); it is read on the device, and nothing waits for it. In torch the
            gradients are left multiplied by it, in Triton as they were.
        stochastic_rounding_seed: masters may then be bf16 or fp16 (weights without masters): the
            step is computed in fp32 and rounded up or down at random, without bias. Another seed
            for every step; equal seeds give equal results.

    Raises:
        TypeError: a tensor has another dtype, or a master has 16 bits and there is no seed (it
            would drop most updates of a low learning rate). Nothing has changed then.
        ValueError: a shape, device or layout does not fit, or a weight has no entries; likewise.
    """
    checks.check_batch(batch, stochastic_rounding_seed is not None)
    checks.check_scale(grad_scale)
    settings: dict[str, Any] = {
        "lr": lr,
        "beta1": beta1,
        "beta2": beta2,
        "eps": eps,
        "weight_decay": weight_decay,
    }
    noted = batch[0].noted if batch else None
    if noted is not None:
        parts = {noted.device: batch}
    else:
        parts = by_device(batch, lambda entry: entry.master.device)
    for number, (device, part) in enumerate(parts.items()):
        seed = stochastic_rounding_seed
        if seed is not None:  # parameters are numbered in their part: no two share their bits
            seed += number << 56
        scale = None if grad_scale is None else grad_scale.to(device, non_blocking=True)
        _step(part, device, settings | {"grad_scale": scale, "stochastic_rounding_seed": seed})


def _step(batch: list[AdamWEntry], device: torch.device, settings: dict[str, Any]) -> None:
    """A step of entries that are on one device."""
    if dispatch.implementation_for("masked_adamw", device) == "torch":
        reference.masked_adamw_(batch, **settings)
        return
    from lit_align_kernels.masked_adamw import kernel

    noted = batch[0].noted
    kernel.launch(batch, **settings, noted=noted)
    # Autograd does not see what a kernel writes: a graph that needs the old values must fail.
    written = [t for e in batch for t in (e.master, e.weight) if t is not None]
    torch.autograd.graph.increment_version(written if noted is None else noted.written)
