"""Liger's cross-entropy kernel: loss and gradient over the logits, as in our NPO kernel.

On contiguous rows of V logits, as Liger launches it. Its accesses have no tags: it compares with
ours by *all ≥ 16 B*. Liger has nothing for masks.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from lit_align_kernels.audit.compiled import CompileCase
from lit_align_kernels.audit.traffic import TrafficCase

BLOCK = 32768  # what Liger launches: its largest block, with 32 warps (16 on AMD)
VOCABULARIES = (49152, 50257, 151665)


def is_installed() -> bool:
    """Whether `liger_kernel` can be imported."""
    return importlib.util.find_spec("liger_kernel") is not None


def _kernel() -> Any:
    from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel

    return liger_cross_entropy_kernel


_FIXED: dict[str, Any] = {
    "Y_stride": 1,
    "z_loss_ptr": None,
    "token_accuracy_ptr": None,
    "token_accuracy_stride": 0,
    "predicted_tokens_ptr": None,
    "predicted_tokens_stride": 0,
    "loss_stride": 1,
    "lse_square_scale": 0.0,
    "label_smoothing": 0.0,
    "reduction": "sum",
    "softcap": None,
    "RETURN_Z_LOSS": False,
    "RETURN_TOKEN_ACCURACY": False,
    "RETURN_PREDICTED_TOKENS": False,
    "HAS_WEIGHT": False,
    "HAS_SOFTCAPPING": False,
    "HAS_GRADIENTS": True,
}


def compile_cases(target: str) -> list[CompileCase]:
    """Cross-entropy with its gradient in place, bf16 logits in contiguous rows."""
    cases = []
    for vocabulary in VOCABULARIES:
        divisible = "i32:16" if vocabulary % 16 == 0 else "i32"
        signature = {
            "X_ptr": "*bf16",
            "X_stride": divisible,
            "Y_ptr": "*i64",
            "weight_ptr": "*bf16",
            "loss_ptr": "*fp32",
            "n_cols": divisible,
            "n_non_ignore": "i32",
            "sum_non_ignore_weight": "fp32",
            "weight_sum": "fp32",
            "ignore_index": "i32",
        }
        constexprs = {**_FIXED, "BLOCK_SIZE": BLOCK}
        warps = 16 if target.startswith("gfx") else 32
        name = f"bf16, V = {vocabulary:,}"
        cases.append(CompileCase(name, _kernel(), signature, constexprs, num_warps=warps))
    return cases


def traffic_cases() -> list[TrafficCase]:
    """The same, on a few rows."""
    rows, vocabulary = 4, 50257
    logits = torch.randn(rows, vocabulary).bfloat16()
    targets = torch.randint(vocabulary, (rows,))
    losses = torch.empty(rows)

    def call() -> None:
        _kernel()[(rows,)](
            X_ptr=logits,
            X_stride=vocabulary,
            Y_ptr=targets,
            weight_ptr=logits,
            loss_ptr=losses,
            n_cols=vocabulary,
            n_non_ignore=rows,
            sum_non_ignore_weight=rows,
            weight_sum=0.0,
            ignore_index=-100,
            BLOCK_SIZE=BLOCK,
            **_FIXED,
        )

    minimum = 2 * logits.nbytes + targets.nbytes + losses.nbytes
    return [TrafficCase(f"bf16, V = {vocabulary:,}", call, minimum)]
