"""Attention over packed documents whose branches share a prefix; see `PackedBatch.documents`.

Registered in transformers under names of its own. A call without documents (generation, the padded
layout) is passed on to the implementation that the model had.

FlexAttention, which CUDA devices take, has no backward on a CPU: there it is compared with the
other path forward alone; tests/modules/gpu has whole training runs.
"""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface

from lit_align.errors import ModelError

NAME_PREFIX = "shared_prefix_"
ORDINARY = ("sdpa", "flex_attention")  # the implementations that documents are added to
USE_PADDED = "set the data's layout: padded"
Documents: TypeAlias = tuple[tuple[int, ...], ...]
# Graphs of one function: with a gradient or not, with a window or not, of up to 128 tokens or more,
# in the check or under autocast. Past the limit (8) all that is new would run uncompiled.
GRAPHS = 64
LEAST_WIDTH = 16  # of a head, in FlexAttention's kernels; stories260K's are 8 wide


class DocumentLayout:
    """Who attends to whom in a packed row; made once a batch, given to the decoder as a keyword.

    Attributes:
        documents: see `PackedBatch`.
        lengths: tokens of each document.
        windows: the sliding windows that attention was called with, in order.
    """

    def __init__(self, documents: Documents, device: torch.device) -> None:
        self.documents = documents
        self.lengths = [sum(document) for document in documents]
        self.windows: list[int | None] = []
        self._device = device
        self._masks: dict[Any, list[Tensor | None]] = {}
        self._block_masks: dict[int | None, BlockMask] = {}

    def masks(self, window: int | None, dtype: torch.dtype) -> list[Tensor | None]:
        """(L, L) of 0 and −inf for each document of L tokens; None where it is merely causal.

        Args:
            window: a token sees those less than so many positions before it; None: all.
            dtype: of the masks.
        """
        key = window, dtype
        if key not in self._masks:
            made = {d: self._mask(d, window, dtype) for d in dict.fromkeys(self.documents)}
            self._masks[key] = [made[document] for document in self.documents]
        return self._masks[key]

    def _mask(
        self, document: tuple[int, ...], window: int | None, dtype: torch.dtype
    ) -> Tensor | None:
        if window is not None and window >= longest((document,)):
            window = None
        if len(document) == 1 and window is None:
            return None
        branches, positions = branches_and_positions(document, self._device)
        distances = positions[:, None] - positions[None]
        seen = _sees(branches[:, None], branches[None], distances, window)
        mask = torch.zeros(seen.shape, dtype=dtype, device=self._device)
        return mask.masked_fill_(~seen, -torch.inf)

    def block_mask(self, window: int | None) -> BlockMask:
        """The same for FlexAttention, of the whole row."""
        if window not in self._block_masks:
            parts = [branches_and_positions(d, self._device) for d in self.documents]
            branches, positions = (torch.cat(part) for part in zip(*parts, strict=True))
            lengths = torch.tensor(self.lengths, device=self._device)
            owners = torch.arange(len(lengths), device=self._device).repeat_interleave(lengths)

            def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                distance = positions[query] - positions[key]
                same = owners[query] == owners[key]
                return same & _sees(branches[query], branches[key], distance, window)

            make = (
                _compiled(create_block_mask) if self._device.type == "cuda" else create_block_mask
            )
            size = len(owners)
            self._block_masks[window] = make(seen, None, None, size, size, device=self._device)
        return self._block_masks[window]


def longest(documents: Documents) -> int:
    """Tokens of the longest sequence: prefix and branch."""
    return max(document[0] + max(document[1:], default=0) for document in documents)


def branches_and_positions(
    document: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The branch (0: the prefix) and the position of each token of a document, (L,) each."""
    lengths = torch.tensor(document, device=device)
    branches = torch.arange(len(document), device=device).repeat_interleave(lengths)
    starts = lengths.cumsum(0) - lengths
    positions = torch.arange(sum(document), device=device) - starts[branches]
    return branches, torch.where(branches > 0, positions + document[0], positions)


def _sees(query_branch: Any, key_branch: Any, distance: Any, window: int | None) -> Any:
    """Whether a query sees a key of its document that is `distance` positions before it."""
    seen = ((key_branch == 0) | (key_branch == query_branch)) & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: DocumentLayout,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer: FlexAttention on CUDA, else document by document.

    Args:
        module: the layer's.
        query: (1, H, T, d).
        key: (1, G, T, d): each serves H / G query heads.
        value: likewise.
        layout: of the row.
        dropout: share of attention weights to drop.
        scaling: of the products; None: 1/√d.
        sliding_window: in positions.
        softcap: of the products (Gemma 2); on CUDA alone.
        **settings: what else the model asks of attention.

    Returns:
        (1, T, H, d), and None for the attention weights.

    Raises:
        ModelError: a setting that cannot be honoured.
    """
    _refuse(module, "sinks", settings.get("s_aux"))
    _refuse(module, "a position bias", settings.get("position_bias"))
    layout.windows.append(sliding_window)
    if query.device.type != "cuda":
        _refuse(module, "a soft cap, which needs a CUDA device", softcap)
        return by_document(query, key, value, layout, sliding_window, scaling, dropout), None
    _refuse(module, "dropout", dropout or None)
    attend = _compiled(flex_attention)
    output = by_flex_attention(query, key, value, layout, sliding_window, scaling, softcap, attend)
    return output, None


def _refuse(module: nn.Module, what: str, value: Any) -> None:
    if value is not None:
        name = type(module).__name__
        raise ModelError(f"layout shared_prefix does not suit {name} with {what}: {USE_PADDED}")


def by_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: DocumentLayout,
    window: int | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """One call of torch's attention a document; see `document_attention`."""
    grouped = query.shape[1] != key.shape[1]
    # `split`, whose backward joins: that of slices would fill a whole tensor for each.
    parts = (tensor.split(layout.lengths, 2) for tensor in (query, key, value))
    outputs = [
        F.scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        ).transpose(1, 2)
        for q, k, v, mask in zip(*parts, layout.masks(window, query.dtype), strict=True)
    ]
    return torch.cat(outputs, 1)


def by_flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: DocumentLayout,
    window: int | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    attend: Any = flex_attention,
) -> Tensor:
    """FlexAttention over the whole row; see `document_attention`.

    Args:
        query: and the rest as there.
        key: likewise.
        value: likewise.
        layout: likewise.
        window: likewise.
        scaling: likewise.
        softcap: likewise.
        attend: `flex_attention`, compiled or not.
    """
    if torch.is_autocast_enabled(query.device.type):  # rotated in fp32, beside values in 16 bits
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    width = value.shape[-1]
    query, key, value = (_wide_enough(tensor) for tensor in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    if groups & (groups - 1):  # its kernels for short rows want a power of two
        key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))

    def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    output = attend(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=layout.block_mask(window),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[..., :width].transpose(1, 2).contiguous()


def _wide_enough(heads: Tensor) -> Tensor:
    """With zeros behind each head, where it is narrower than FlexAttention's kernels take."""
    missing = LEAST_WIDTH - heads.shape[-1]
    return F.pad(heads, (0, missing)) if missing > 0 else heads


@functools.cache
def _compiled(function: Any) -> Any:
    return torch._dynamo.config.patch(recompile_limit=GRAPHS)(torch.compile(function))


def _registered(implementation: str) -> Any:
    ordinary = AttentionInterface()[implementation]

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        documents: DocumentLayout | None = None,
        **settings: Any,
    ) -> Any:
        if documents is None:
            return ordinary(module, query, key, value, attention_mask, **settings)
        return document_attention(module, query, key, value, documents, **settings)

    return forward


for _name in ORDINARY:
    AttentionInterface.register(NAME_PREFIX + _name, _registered(_name))
    AttentionMaskInterface.register(NAME_PREFIX + _name, AttentionMaskInterface()[_name])
