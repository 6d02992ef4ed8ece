"""Which implementation of an operation runs: the Triton kernel or plain torch."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from typing import Literal

import torch

Implementation = Literal["triton", "torch"]

logger = logging.getLogger(__name__)

TRITON_OPERATIONS = frozenset(
    {
        "masked_adamw",
        "masked_weight_grad",
        "swap_selected",
        "token_logprobs",
        "weighted_preference_loss",
    }
)


@functools.cache
def _log_choice(operation: str, implementation: Implementation, why: str) -> None:
    logger.info("%s runs in %s (%s)", operation, implementation, why)


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _can_run_triton(device: torch.device) -> bool:
    """On a GPU; on other devices' tensors only in Triton's interpreter (`kernels/audit`)."""
    if not _triton_is_installed():
        return False
    if device.type == "cuda":
        return True
    import triton

    return bool(triton.knobs.runtime.interpret)


def implementation_for(operation: str, device: torch.device) -> Implementation:
    """Choose the implementation of `operation` for tensors on `device`.

    The environment variable `LIT_ALIGN_KERNELS` decides: `auto` (default: Triton on a GPU, where it
    is installed and the operation has a kernel), `triton`, or `torch`.

    Raises:
        ValueError: for another value of `LIT_ALIGN_KERNELS`.
        NotImplementedError: Triton was asked for, and the operation has no Triton kernel, the
            tensors are not on a GPU, or Triton is not installed. No choice that was asked for falls
            back silently.
    """
    choice = os.environ.get("LIT_ALIGN_KERNELS", "auto")
    if choice not in ("auto", "triton", "torch"):
        raise ValueError(f"LIT_ALIGN_KERNELS={choice!r}: choose auto, triton or torch")
    picked: Implementation = "torch"
    if choice == "triton" or (choice == "auto" and device.type == "cuda"):
        possible = operation in TRITON_OPERATIONS and _can_run_triton(device)
        if choice == "triton" and not possible:
            raise NotImplementedError(
                f"LIT_ALIGN_KERNELS=triton, but {operation} cannot run in Triton here (device "
                f"{device.type}, triton {'is' if _triton_is_installed() else 'is not'} installed): "
                "set auto or torch"
            )
        picked = "triton" if possible else "torch"
    _log_choice(operation, picked, f"LIT_ALIGN_KERNELS={choice}, device {device.type}")
    return picked
