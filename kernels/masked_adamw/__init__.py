"""One AdamW step on selected entries, writing the new values into the weights."""

from __future__ import annotations

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
) -> None:
    """One AdamW step, in place, on every entry of `batch`.

    Args:
        batch: masters, gradients and moments in fp32; weights in fp32, bf16 or fp16. All of one
            device.
        lr: learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled; acts on the selected entries alone.
    """
    if not batch:
        return
    dispatch.implementation_for("masked_adamw", batch[0].master.device)
    reference.masked_adamw_(
        batch, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay
    )
