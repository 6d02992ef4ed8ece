"""What the step's few operations that read values allocate, without values.

Under `FakeTensorMode` nothing can depend on what a tensor holds. Every function here takes the
place of one that does (or of a Triton kernel) and makes tensors of the same sizes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import masking_utils

from lit_align.compact import layers
from lit_align.modules import loaded
from lit_align_kernels import dispatch, products
from lit_align_kernels.entries import Entries
from lit_align_kernels.swap_selected import reference as swap_reference
from lit_align_kernels.token_logprobs import chunks


@contextlib.contextmanager
def weightless(*, padded: bool, gpu: bool) -> Iterator[None]:
    """Let a training step run on fake tensors.

    Args:
        padded: whether the batch has padding, which transformers would look for.
        gpu: allocate as the Triton path does on a GPU (the fake tensors' device is the CPU still,
            since autograd refuses others where torch is built without them).
    """
    with contextlib.ExitStack() as stack:

        def replace(owner: Any, name: str, stand_in: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, stand_in))

        replace(layers, "_embedding_gradient", embedding_gradient)
        replace(swap_reference, "_write_rows", _nothing)
        replace(loaded, "check_head", _nothing)
        if not padded:
            replace(masking_utils, "is_tracing", lambda tensor=None: False)
        if gpu:
            _as_on_a_gpu(replace)
        yield


def embedding_gradient(ids: Tensor, grad: Tensor, entries: Entries) -> Tensor:
    """`layers._embedding_gradient`, for ids that all differ and selections spread evenly."""
    if entries.kind == "all":
        out = torch.zeros(entries.shape, dtype=torch.float32)
        return out.index_add_(0, ids, grad).reshape(-1)
    share = entries.numel / (entries.shape[0] * entries.shape[1])
    if entries.kind == "rows":
        assert entries.rows is not None
        slot = torch.searchsorted(entries.rows, ids).clamp_(max=entries.rows.numel() - 1)
        keep = entries.rows[slot] == ids
        found = max(1, round(share * ids.numel()))
        out = grad.new_zeros(entries.rows.numel(), grad.shape[1])
        chosen = slot.new_empty(found), grad.new_empty(found, grad.shape[1])
        del keep
        return out.index_add_(0, *chosen).reshape(-1)
    assert entries.positions is not None and entries.row_offsets is not None
    per_token = grad.new_zeros(ids.numel(), grad.shape[1]).index_add_(0, ids, grad)
    found = max(1, round(share * grad.numel()))
    owner = ids.new_empty(found)
    slots = torch.arange(found) - ids[owner]
    slots += ids[owner]
    columns = entries.positions[slots].long() - ids[owner] * grad.shape[1]
    out = torch.zeros(entries.numel, dtype=torch.float32)
    out[slots] = per_token[owner, columns]
    return out


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _as_on_a_gpu(replace: Any) -> None:
    """Triton's kernels allocate little besides their results."""
    from lit_align_kernels.masked_adamw import kernel as adamw_kernel
    from lit_align_kernels.masked_weight_grad import kernel as gradient_kernel
    from lit_align_kernels.swap_selected import kernel as swap_kernel
    from lit_align_kernels.token_logprobs import kernel as rows_kernel
    from lit_align_kernels.weighted_preference_loss import kernel as loss_kernel

    replace(dispatch, "implementation_for", lambda operation, device: "triton")
    replace(adamw_kernel, "launch", _nothing)
    replace(gradient_kernel, "masked_weight_grad", _nothing)
    replace(swap_kernel, "launch", _nothing)
    replace(rows_kernel, "rows_forward", _two_a_row)
    replace(rows_kernel, "rows_backward_", _nothing)
    replace(loss_kernel, "npo_rows_", _two_a_row)
    replace(chunks, "CPU_LOGITS_BYTES", chunks.GPU_LOGITS_BYTES)
    replace(chunks, "CPU_BLOCK", 1 << 40)  # a GPU takes the whole vocabulary at once
    replace(products, "_onednn", _nothing)
    replace(products, "has_faster_products", lambda: False)


def _two_a_row(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return logits.new_empty(len(logits), dtype=torch.float32), logits.new_empty(
        len(logits), dtype=torch.float32
    )
