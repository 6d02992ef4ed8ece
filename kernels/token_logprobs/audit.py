"""Rows of logits: log-prob of the target forward, the gradient over the logits backward.

Rows that we allocate start at multiples of 128 bytes. Where 16 does not divide V, the columns
beyond the last multiple of 16 are one narrow access of a row, which counts here as much as the wide
ones of the loop over the row: of V = 50,257 it is one column.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lit_align_kernels.audit.compiled import CompileCase
from lit_align_kernels.audit.traffic import TrafficCase
from lit_align_kernels.token_logprobs.kernel import (
    GROUP,
    backward_kernel,
    forward_kernel,
    padded_logits,
    padded_vocabulary,
    row_config,
    rows_backward_,
    rows_forward,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# (vocabulary, dtype, soft-capped, rows without padding). Nothing of ours makes the last kind.
Shape = tuple[int, str, bool, bool]
SHAPES: tuple[Shape, ...] = (
    (507, "bf16", False, False),
    (49152, "bf16", False, False),
    (50257, "bf16", False, False),
    (50257, "bf16", True, False),
    (151665, "bf16", False, False),
)
MORE_SHAPES: tuple[Shape, ...] = (
    (507, "fp32", True, False),
    (49152, "fp32", True, False),
    (49152, "bf16", True, False),
    (50257, "fp16", False, False),
    (50257, "fp16", True, False),
    (50257, "fp32", True, False),
    (151665, "fp32", False, False),
    (50257, "bf16", False, True),
    (151665, "fp32", False, True),
    (262144, "bf16", False, False),
)


def row_case(
    kernel: Any,
    tensors: dict[str, str],
    numbers: dict[str, str],
    shape: Shape,
    target: str,
) -> CompileCase:
    """A row kernel as it is launched on `target` with logits of `shape`."""
    vocabulary, dtype, capped, contiguous = shape
    torch_dtype = DTYPES[dtype]
    config = row_config(vocabulary, torch_dtype.itemsize, 64 if target.startswith("gfx9") else 32)
    stride = vocabulary if contiguous else padded_vocabulary(vocabulary, torch_dtype)
    name = f"V={vocabulary} {dtype}{' contiguous' * contiguous}{' soft-cap' * capped}"
    return CompileCase(
        name,
        kernel,
        {
            "logits_ptr": f"*{dtype}",
            **tensors,
            "stride": _number(stride),
            "V": _number(vocabulary),
            "logit_scale": "fp32",
            "soft_cap": "fp32",
            **numbers,
        },
        {
            "CAPPED": capped,
            "EDGES": vocabulary % GROUP != 0 or stride % GROUP != 0,
            "UNROLL": config.unroll,
            "LANES": config.lanes,
        },
        config.num_warps,
    )


def _number(value: int) -> str:
    return "i32:16" if value % 16 == 0 else "i32"


def row_cases(
    kernel: Any,
    tensors: dict[str, str],
    numbers: dict[str, str],
    target: str,
    shapes: tuple[Shape, ...],
) -> list[CompileCase]:
    """`row_case` for each of `shapes`."""
    return [row_case(kernel, tensors, numbers, shape, target) for shape in shapes]


def compile_cases(target: str, shapes: tuple[Shape, ...] = SHAPES) -> list[CompileCase]:
    """Both kernels as they are launched on `target`."""
    forward = {"targets_ptr": "*i64", "logps_ptr": "*fp32", "logsumexp_ptr": "*fp32"}
    backward = {"targets_ptr": "*i64", "logsumexp_ptr": "*fp32", "grad_ptr": "*fp32"}
    return [
        *row_cases(forward_kernel, forward, {}, target, shapes),
        *row_cases(backward_kernel, backward, {}, target, shapes),
    ]


def traffic_cases() -> list[TrafficCase]:
    """Forward: one read of the logits. Backward: one read and one write."""
    cases = []
    for vocabulary, dtype in ((507, torch.bfloat16), (1000, torch.float32), (50257, torch.float16)):
        for passes in ("forward", "backward"):
            name = f"{passes} V={vocabulary} {str(dtype).removeprefix('torch.')}"
            cases.append(TrafficCase(name, *_rows(passes, 3, vocabulary, dtype)))
    return cases


def _rows(
    passes: str, rows: int, vocabulary: int, dtype: torch.dtype
) -> tuple[Callable[[], Any], int]:
    logits = padded_logits(rows, vocabulary, dtype, torch.device("cpu"))
    logits.copy_(torch.randn(rows, vocabulary))
    targets = torch.arange(rows)
    logit_bytes = rows * vocabulary * dtype.itemsize
    if passes == "forward":  # targets in, log-probs and logsumexp out
        return lambda: rows_forward(logits, targets, 1.0, None), logit_bytes + rows * (8 + 4 + 4)
    logsumexp, grad = torch.zeros(rows), torch.ones(rows)
    return (
        lambda: rows_backward_(logits, targets, logsumexp, grad, 1.0, None),
        2 * logit_bytes + rows * (8 + 4 + 4),
    )
