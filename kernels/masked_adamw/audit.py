"""A step of the selected entries, found by bitmap, by list of positions, or by rows.

Gradient, moments and master are contiguous; the narrow ones among their accesses belong to the last
15 entries of a parameter at most, and to a gradient in a bucket whose address 16 does not divide.
The weight is written where the mask says, which is what *scattered* counts: single entries go in
accesses of their own size (rows of a length that 16 divides: 16 bytes), so that a warp touches
about one sector an entry; that, and nothing else, is what sectors ÷ moved is above 1.

Masters and moments are tensors of their own, at addresses that 16 divides. A master that is a view
at another address (a wholly trained parameter inside a larger tensor) is stepped too, through
accesses of the size of an entry; no configuration here is of that kind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_align_kernels import launch_tables
from lit_align_kernels.audit.compiled import CompileCase
from lit_align_kernels.audit.traffic import TrafficCase
from lit_align_kernels.entries import Entries
from lit_align_kernels.masked_adamw import kernel
from lit_align_kernels.masked_adamw.reference import AdamWEntry
from lit_align_kernels.swap_selected.audit import bytes_of_entries, example_entries, named_tensors

SIGNATURE = {
    "table": "*i64",
    "programs": "*i32",
    "grad_scale": "*fp32",
    **dict.fromkeys(("lr", "decay", "beta1", "one_minus_beta1", "log_beta1"), "fp32"),
    **dict.fromkeys(("beta2", "one_minus_beta2", "log_beta2", "eps"), "fp32"),
}
SETTINGS: dict[str, Any] = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
INT32, INT64 = torch.int32, torch.int64


def compile_cases(target: str) -> list[CompileCase]:
    """Every kind of entries, and every alignment and dtype that training meets."""
    variants = {
        "bitmap": _variant("bitmap"),
        "bitmap, bf16 gradient in a bucket": _variant("bitmap", grad=BF16, grad_aligned=False),
        "bitmap, past 2**31": _variant("bitmap", index=INT64, weight=FP32),
        "list": _variant("index"),
        "list, int64, bf16 gradient in a bucket": _variant(
            "index", index=INT64, grad=BF16, grad_aligned=False
        ),
        "list, gradient in a bucket": _variant("index", grad_aligned=False),
        "rows": _variant("rows", index=INT64, even=True),
        "rows, gradient in a bucket": _variant("rows", index=INT64, even=True, grad_aligned=False),
        "rows of odd length": _variant("rows", index=INT64, weight=FP16),
        "short rows": _variant("short_rows", index=INT64, even=True, grad=BF16),
        "short rows, gradient in a bucket": _variant(
            "short_rows", index=INT64, even=True, grad_aligned=False
        ),
        "whole, fp16": _variant("all", even=True, weight=FP16),
        "whole, no weight": _variant("all", even=True, weight=None),
        "whole, no weight, gradient in a bucket": _variant(
            "all", even=True, weight=None, grad_aligned=False
        ),
        "whole, bf16 rounded at random": _variant(
            "all", even=True, weight=None, master=BF16, grad=BF16, stochastic=True
        ),
        "bitmap, fp16 rounded at random, bf16 gradient in a bucket": _variant(
            "bitmap", weight=FP16, master=FP16, grad=BF16, grad_aligned=False, stochastic=True
        ),
    }
    block, warps = launch_tables.block_entries(target), launch_tables.num_warps(target)
    return [
        CompileCase(name, kernel.masked_adamw_kernel, SIGNATURE, v.constexprs(block), warps)
        for name, v in variants.items()
    ]


def _variant(
    kind: str,
    *,
    index: torch.dtype = INT32,
    even: bool = False,
    master: torch.dtype = FP32,
    weight: torch.dtype | None = BF16,
    grad: torch.dtype = FP32,
    grad_aligned: bool = True,
    stochastic: bool = False,
) -> kernel.Variant:
    even = even or kind == "index"  # positions lie in a tensor of their own
    return kernel.Variant(kind, index, even, master, weight, grad, True, grad_aligned, stochastic)


def traffic_cases() -> list[TrafficCase]:
    """A weight of 2**17 entries or more in bf16, of which a tenth trains, in every kind."""
    cases = []
    for name, entries in example_entries().items():
        for grad, offset in ((FP32, 0), (BF16, 3)):
            where = "in a bucket" if offset else "aligned"
            cases.append(_traffic_case(f"{name}, {grad} gradient {where}", entries, grad, offset))
    return cases


def _traffic_case(name: str, entries: Entries, grad: torch.dtype, offset: int) -> TrafficCase:
    m = entries.numel
    weight = torch.zeros(entries.shape, dtype=BF16)
    entry = AdamWEntry(
        torch.zeros(m),
        torch.ones(m + offset, dtype=grad)[offset:],
        torch.zeros(m),
        torch.zeros(m),
        torch.zeros(()),
        weight,
        entries,
    )
    scale = torch.ones(())

    def call() -> None:
        kernel.launch([entry], **SETTINGS, grad_scale=scale)

    minimum = m * (grad.itemsize + 3 * 2 * 4) + bytes_of_entries(weight, entries)
    tensors: dict[str, Tensor] = {
        name: getattr(entry, name) for name in ("master", "grad", "exp_avg", "exp_avg_sq", "step")
    }
    return TrafficCase(name, call, minimum, tensors | named_tensors(weight, entries))
