"""Which implementation of an operation runs: the Triton kernel or plain torch."""

from __future__ import annotations

import functools
import logging
import os
from typing import Literal

import torch

Implementation = Literal["triton", "torch"]

logger = logging.getLogger(__name__)

# Operations whose Triton kernel exists. Until an operation is named here, `auto` is torch and
# asking for triton is an error: no choice that was asked for falls back silently.
TRITON_OPERATIONS: frozenset[str] = frozenset()


@functools.cache
def _log_choice(operation: str, implementation: Implementation, why: str) -> None:
    logger.info("%s runs in %s (%s)", operation, implementation, why)


def implementation_for(operation: str, device: torch.device) -> Implementation:
    """Choose the implementation of `operation` for tensors on `device`.

    The environment variable `LIT_ALIGN_KERNELS` decides: `auto` (default: Triton on a GPU where the
    operation has a kernel), `triton`, or `torch`.

    Raises:
        ValueError: for another value of `LIT_ALIGN_KERNELS`.
        NotImplementedError: Triton was asked for and this operation has no Triton kernel.
    """
    choice = os.environ.get("LIT_ALIGN_KERNELS", "auto")
    if choice not in ("auto", "triton", "torch"):
        raise ValueError(f"LIT_ALIGN_KERNELS={choice!r}: choose auto, triton or torch")
    if choice == "triton" and operation not in TRITON_OPERATIONS:
        raise NotImplementedError(
            f"LIT_ALIGN_KERNELS=triton, but {operation} has no Triton kernel: set auto or torch"
        )
    on_gpu = device.type == "cuda" and operation in TRITON_OPERATIONS
    picked: Implementation = (
        "triton" if choice == "triton" or (choice == "auto" and on_gpu) else "torch"
    )
    _log_choice(operation, picked, f"LIT_ALIGN_KERNELS={choice}, device {device.type}")
    return picked
