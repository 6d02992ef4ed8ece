"""What the path on a GPU allocates, for fake tensors that stand on the CPU.

Autograd refuses a GPU's tensors, fake ones too, where torch is built without it. So the tensors of
a plan stand on the CPU, and what the code does otherwise on a GPU is put in its place here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_align.compact import fast_products
from lit_align.errors import TrainingError
from lit_align.modules import document_attention
from lit_align_kernels import dispatch, products
from lit_align_kernels.token_logprobs import chunks

aten = torch.ops.aten
Replace = Callable[[Any, str, Any], None]


def as_on_a_gpu(replace: Replace) -> None:
    """Put the Triton path's allocations in the place of the CPU's.

    Its kernels allocate little besides their results; for the tables that they derive from a mask
    see `PlannedMask.tables`.

    Raises:
        TrainingError: Triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise TrainingError(
            "a plan for a GPU counts what Triton's kernels allocate, and triton is not installed: "
            "install it, or plan for device cpu"
        )
    from lit_align_kernels.masked_adamw import kernel as adamw_kernel
    from lit_align_kernels.masked_weight_grad import kernel as gradient_kernel
    from lit_align_kernels.swap_selected import kernel as swap_kernel
    from lit_align_kernels.token_logprobs import kernel as rows_kernel
    from lit_align_kernels.weighted_preference_loss import kernel as loss_kernel

    replace(dispatch, "implementation_for", lambda operation, device: "triton")
    for kernel, name in (
        (adamw_kernel, "launch"),
        (gradient_kernel, "masked_weight_grad"),
        (swap_kernel, "launch"),
        (rows_kernel, "rows_backward_"),
    ):
        replace(kernel, name, _nothing)
    replace(rows_kernel, "rows_forward", _two_a_row)
    replace(loss_kernel, "npo_rows_", _two_a_row)
    replace(chunks, "CPU_LOGITS_BYTES", chunks.GPU_LOGITS_BYTES)
    replace(chunks, "CPU_BLOCK", 1 << 40)  # a GPU takes the whole vocabulary at once
    replace(products, "has_faster_products", lambda: False)
    replace(fast_products, "has_faster_products", lambda: False)
    replace(torch.nn.functional, "scaled_dot_product_attention", _attention)
    replace(document_attention, "by_document", _by_flex_attention)
    replace(document_attention.DocumentLayout, "block_mask", _nothing)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _two_a_row(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    first = logits.new_empty(len(logits), dtype=torch.float32)
    return first, torch.empty_like(first)


def _by_flex_attention(query: Tensor, key: Tensor, value: Tensor, layout: Any, *_: Any) -> Tensor:
    """FlexAttention keeps what FlashAttention does: its output and a logsumexp for each query."""

    def attend(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
        return _fused(query, key, value)

    return document_attention.by_flex_attention(query, key, value, layout, attend=attend)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernels that torch chooses on a GPU.

    FlashAttention where it can; with a mask or in fp32 the memory-efficient kernel, which takes no
    grouped heads: torch then forms all attention weights.
    """
    if attn_mask is None and query.dtype != torch.float32:
        return _fused(query, key, value)
    if query.shape[1] != key.shape[1]:
        return aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    if attn_mask is not None:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).expand(
            *query.shape[:-1], key.shape[-2]
        )
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]


def _fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, False)[0]
