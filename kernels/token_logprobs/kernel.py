"""Triton kernels over rows of logits: target log-probs, and their gradient in place.

One program takes one row; `row.py` says how.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_align_kernels.token_logprobs.row import (
    load_target,
    softmax_sum,
    target_logit,
    write_gradient,
)

GROUP = 16  # what V and a row stride must divide by to need no narrow accesses
ROW_BYTES = 128  # rows start at multiples of this


@dataclasses.dataclass(frozen=True)
class RowConfig:
    """How a row is spread over a program.

    Attributes:
        num_warps: warps of the program.
        lanes: elements that the program's threads cover with one 16-byte access each.
        unroll: accesses that a thread has in flight.
    """

    num_warps: int
    lanes: int
    unroll: int


def row_config(vocabulary: int, itemsize: int, warp_size: int = 32) -> RowConfig:
    """The configuration for rows of `vocabulary` logits of `itemsize` bytes.

    16 elements a thread, and 256 threads for a long row: no spills, and room for several programs
    on a multiprocessor.
    """
    threads = 128 if vocabulary <= 8192 else 256
    return RowConfig(threads // warp_size, threads * 16 // itemsize, itemsize)


@triton.jit
def forward_kernel(
    logits_ptr, targets_ptr, logps_ptr, logsumexp_ptr, stride, V, logit_scale, soft_cap,
    CAPPED: tl.constexpr, EDGES: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Log-prob of the target and logsumexp of one row."""
    row = tl.program_id(0)
    target, valid = load_target(targets_ptr, row, V)
    z = target_logit(logits_ptr, row, stride, target, valid, logit_scale, soft_cap, CAPPED)
    peak, total = softmax_sum(
        logits_ptr, row, stride, V, logit_scale, soft_cap, CAPPED, EDGES, UNROLL, LANES
    )
    tl.store(logps_ptr + row, (z - peak) - tl.log(total))  # table
    tl.store(logsumexp_ptr + row, peak + tl.log(total))  # table


@triton.jit
def backward_kernel(
    logits_ptr, targets_ptr, logsumexp_ptr, grad_ptr, stride, V, logit_scale, soft_cap,
    CAPPED: tl.constexpr, EDGES: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The gradient over one row."""
    row = tl.program_id(0)
    target, _ = load_target(targets_ptr, row, V)
    logsumexp = tl.load(logsumexp_ptr + row)  # table
    grad = tl.load(grad_ptr + row)  # table
    write_gradient(
        logits_ptr, row, stride, V, target, logsumexp, grad, logit_scale, soft_cap,
        CAPPED, EDGES, UNROLL, LANES,
    )  # fmt: skip


def launch_options(logits: Tensor, soft_cap: float | None) -> dict[str, Any]:
    """Arguments that every row kernel takes, from `stride` on."""
    vocabulary, stride = logits.shape[1], logits.stride(0)
    config = row_config(vocabulary, logits.element_size(), 64 if torch.version.hip else 32)
    return {
        "stride": stride,
        "V": vocabulary,
        "soft_cap": 1.0 if soft_cap is None else float(soft_cap),
        "CAPPED": soft_cap is not None,
        "EDGES": vocabulary % GROUP != 0 or stride % GROUP != 0,
        "UNROLL": config.unroll,
        "LANES": config.lanes,
        "num_warps": config.num_warps,
    }


def check_rows(logits: Tensor, **per_row: Tensor) -> list[Tensor]:
    """The tensors of one value a row, contiguous.

    Raises:
        ValueError: logits are not (C, V) with neighbouring columns in neighbouring addresses, or
            another tensor is not (C,).
    """
    if logits.ndim != 2 or (logits.stride(1) != 1 and logits.shape[1] > 1):
        raise ValueError(f"logits {tuple(logits.shape)} of strides {logits.stride()} are no rows")
    for name, tensor in per_row.items():
        if tensor.shape != logits.shape[:1]:
            raise ValueError(f"{name} {tuple(tensor.shape)} do not fit {len(logits)} rows")
    return [tensor.contiguous() for tensor in per_row.values()]


def padded_logits(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised logits (rows, vocabulary) whose rows start at multiples of 128 bytes."""
    return torch.empty((rows, padded_vocabulary(vocabulary, dtype)), dtype=dtype, device=device)[
        :, :vocabulary
    ]


def padded_vocabulary(vocabulary: int, dtype: torch.dtype) -> int:
    """The row stride of `padded_logits`, in elements."""
    group = ROW_BYTES // dtype.itemsize
    return (vocabulary + group - 1) // group * group


def rows_forward(
    logits: Tensor, targets: Tensor, logit_scale: float, soft_cap: float | None
) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets and logsumexp of the logits; one read of them.

    Args:
        logits: (C, V) raw products of the head, bias included; fp32, bf16 or fp16. Any row stride.
        targets: (C,) int64; one outside [0, V) gets NaN.
        logit_scale: factor on the logits.
        soft_cap: c in c·tanh(logits / c), or None.

    Returns:
        Two of (C,) fp32.

    Raises:
        ValueError: where shapes or strides do not fit.
    """
    (targets,) = check_rows(logits, targets=targets)
    logps = torch.empty(logits.shape[:1], dtype=torch.float32, device=logits.device)
    logsumexp = torch.empty_like(logps)
    if logits.numel():
        with torch.cuda.device_of(logits):
            forward_kernel[(logits.shape[0],)](
                logits,
                targets,
                logps,
                logsumexp,
                logit_scale=float(logit_scale),
                **launch_options(logits, soft_cap),
            )
    return logps, logsumexp


def rows_backward_(
    logits: Tensor,
    targets: Tensor,
    logsumexp: Tensor,
    grad: Tensor,
    logit_scale: float,
    soft_cap: float | None,
) -> None:
    """Replace raw head products by grad · d logp / d product; one read and one write.

    Args:
        logits: (C, V) as in `rows_forward`, overwritten.
        targets: (C,) int64.
        logsumexp: (C,) fp32 from `rows_forward`.
        grad: (C,) fp32; a row of 0 is not read and becomes exactly 0.
        logit_scale: factor on the logits.
        soft_cap: c in c·tanh(logits / c), or None.

    Raises:
        ValueError: where shapes or strides do not fit.
    """
    targets, logsumexp, grad = check_rows(logits, targets=targets, logsumexp=logsumexp, grad=grad)
    if logits.numel():
        with torch.cuda.device_of(logits):
            backward_kernel[(logits.shape[0],)](
                logits,
                targets,
                logsumexp,
                grad,
                logit_scale=float(logit_scale),
                **launch_options(logits, soft_cap),
            )
