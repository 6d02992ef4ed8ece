"""What the step's few operations that read values allocate, without values.

Under `FakeTensorMode` nothing can depend on what a tensor holds. Every function here takes the
place of one that does, and makes tensors of the same sizes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import masking_utils

from lit_align.compact import layers
from lit_align.modules import document_attention, loaded, shared_prefix
from lit_align.planning.gpu import as_on_a_gpu
from lit_align_kernels.entries import Entries
from lit_align_kernels.swap_selected import reference as swap_reference


@contextlib.contextmanager
def weightless(*, padded: bool, gpu: bool) -> Iterator[None]:
    """Let a training step run on fake tensors.

    Args:
        padded: whether the batch has padding, which transformers would look for.
        gpu: allocate as the path on a GPU does; see `planning.gpu`.
    """
    with contextlib.ExitStack() as stack:

        def replace(owner: Any, name: str, stand_in: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, stand_in))

        replace(layers, "_embedding_gradient", embedding_gradient)
        replace(swap_reference, "_write_rows", _nothing)
        replace(loaded, "check_head", _nothing)  # compares values, as the next one does
        replace(shared_prefix, "_check", _nothing)
        replace(document_attention, "branches_and_positions", _two_a_token)
        replace(nn.Module, "_apply", _apply)
        if not padded:
            replace(masking_utils, "is_tracing", lambda tensor=None: False)
        if gpu:
            as_on_a_gpu(replace)
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


def _two_a_token(document: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    places = torch.arange(sum(document), device=device)
    return places, torch.empty_like(places)


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """As torch's, which would swap fake parameters: they may not be referred to elsewhere then."""
    for child in self.children() if recurse else ():
        child._apply(fn)
    for name, parameter in self._parameters.items():
        if parameter is not None and (found := fn(parameter.detach())).dtype != parameter.dtype:
            self._parameters[name] = nn.Parameter(found, requires_grad=parameter.requires_grad)
    for name, buffer in self._buffers.items():
        self._buffers[name] = None if buffer is None else fn(buffer)
    return self
