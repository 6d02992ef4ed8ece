"""Token NPO: loss, and gradient over the logits, in one launch.

A row is read for its logsumexp and read again while its gradient is written: by the program text
1.5 times the minimum (one read, one write), of which the second read is a cache's work where the
rows in flight fit it. DPO and other losses run the two kernels of token_logprobs around them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lit_align_kernels.audit.compiled import CompileCase
from lit_align_kernels.audit.traffic import TrafficCase
from lit_align_kernels.token_logprobs.audit import SHAPES, Shape, row_cases
from lit_align_kernels.token_logprobs.kernel import padded_logits
from lit_align_kernels.weighted_preference_loss.kernel import npo_kernel, npo_rows_


def compile_cases(target: str, shapes: tuple[Shape, ...] = SHAPES) -> list[CompileCase]:
    """The kernel as it is launched on `target`."""
    tensors = {
        "targets_ptr": "*i64",
        "ref_logps_ptr": "*fp32",
        "token_weights_ptr": "*fp32",
        "losses_ptr": "*fp32",
        "logps_ptr": "*fp32",
    }
    return row_cases(npo_kernel, tensors, {"beta": "fp32", "ignore_index": "i32"}, target, shapes)


def traffic_cases() -> list[TrafficCase]:
    """What has to come from memory is one read and one write of the logits.

    The kernel's text reads a row twice; the second read, of a row that was just read, is left to
    the cache. So bytes moved are 1.5 times the minimum, and distinct bytes are the minimum.
    """
    return [
        TrafficCase(
            f"V={vocabulary} {str(dtype).removeprefix('torch.')}", *_rows(vocabulary, dtype)
        )
        for vocabulary, dtype in (
            (507, torch.bfloat16),
            (1000, torch.float32),
            (50257, torch.float16),
        )
    ]


def _rows(vocabulary: int, dtype: torch.dtype) -> tuple[Callable[[], Any], int]:
    rows = 3
    logits = padded_logits(rows, vocabulary, dtype, torch.device("cpu"))
    logits.copy_(torch.randn(rows, vocabulary))
    targets, ref_logps, token_weights = torch.arange(rows), torch.zeros(rows), torch.ones(rows)
    # Targets, reference and weights in, losses and log-probs out.
    minimum = 2 * rows * vocabulary * dtype.itemsize + rows * (8 + 4 + 4 + 4 + 4)
    return (
        lambda: npo_rows_(logits, targets, ref_logps, token_weights, 0.1, 1.0, None, -100),
        minimum,
    )
