"""Attention over packed documents whose branches share a prefix; see `PackedBatch.documents`.

Registered in transformers under names of its own. A call without documents (generation, the padded
layout) is passed on to the implementation that the model had.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from lit_align.errors import ModelError

PREFIX = "shared_prefix_"
IMPLEMENTATIONS = ("sdpa", "flex_attention")
USE_PADDED = "set the data's layout: padded"
Documents = tuple[tuple[int, ...], ...]


class DocumentLayout:
    """Who attends to whom in a packed row; made once a batch, given to the decoder as a keyword.

    Attributes:
        documents: see `PackedBatch`.
        lengths: tokens of each document.
        windows: by layer index, the sliding windows that attention was called with.
    """

    def __init__(self, documents: Documents, device: torch.device) -> None:
        self.documents = documents
        self.device = device
        self.lengths = [sum(document) for document in documents]
        self.windows: dict[int, int | None] = {}
        self._masks: dict[Any, list[Tensor | None]] = {}

    def masks(self, window: int | None, dtype: torch.dtype) -> list[Tensor | None]:
        """(L, L) of 0 and −inf for each document of L tokens; None where it is merely causal.

        Args:
            window: a token sees those less than so many positions before it; None: all.
            dtype: of the masks.
        """
        key = window, dtype
        if key not in self._masks:
            shapes = dict.fromkeys(self.documents)
            made = {shape: self._mask(shape, window, dtype) for shape in shapes}
            self._masks[key] = [made[document] for document in self.documents]
        return self._masks[key]

    def _mask(
        self, document: tuple[int, ...], window: int | None, dtype: torch.dtype
    ) -> Tensor | None:
        longest = document[0] + max(document[1:], default=0)
        if window is not None and window >= longest:
            window = None
        if len(document) == 1 and window is None:
            return None
        branches, positions = branches_and_positions(document, self.device)
        seen = sees(branches[:, None], branches[None], positions[:, None] - positions[None], window)
        mask = torch.zeros(seen.shape, dtype=dtype, device=self.device)
        return mask.masked_fill_(~seen, -torch.inf)


def branches_and_positions(
    document: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The branch (0: the prefix) and the position of each token of a document, (L,) each."""
    lengths = torch.tensor(document, device=device)
    branches = torch.arange(len(document), device=device).repeat_interleave(lengths)
    places = torch.arange(sum(document), device=device)
    starts = lengths.cumsum(0) - lengths
    first = torch.where(branches > 0, document[0], 0)
    return branches, places - starts[branches] + first


def sees(query_branch: Any, key_branch: Any, distance: Any, window: int | None) -> Any:
    """Whether a query sees a key of its document that is `distance` positions before it."""
    own = (key_branch == 0) | (key_branch == query_branch)
    seen = own & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: DocumentLayout,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, document by document.

    Args:
        module: the layer's.
        query: (1, H, T, d).
        key: (1, G, T, d), of G groups of query heads.
        value: likewise.
        layout: of the row.
        dropout: share of attention weights to drop.
        scaling: of the products; None: 1/√d.
        sliding_window: in positions.
        **settings: what else the model asks of attention.

    Returns:
        (1, T, H, d), and None for the attention weights.

    Raises:
        ModelError: a setting that is not known here.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if settings.get(name) is not None:
            raise ModelError(f"shared_prefix attention takes no {name}: {USE_PADDED}")
    layout.windows[getattr(module, "layer_idx", 0)] = sliding_window
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # CPU kernels are slow for grouped heads
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    parts = (t.split(layout.lengths, 2) for t in (query, key, value))
    masks = layout.masks(sliding_window, query.dtype)
    outputs = [
        F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
        )
        for q, k, v, mask in zip(*parts, masks, strict=True)
    ]
    return torch.cat([output.transpose(1, 2) for output in outputs], 1), None


def _registered(implementation: str) -> Any:
    ordinary = AttentionInterface._global_mapping[implementation]

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
        return attention(module, query, key, value, documents, **settings)

    return forward


for _name in IMPLEMENTATIONS:
    AttentionInterface.register(PREFIX + _name, _registered(_name))
    AttentionMaskInterface.register(PREFIX + _name, AttentionMaskInterface._global_mapping[_name])


def is_enabled(model: PreTrainedModel) -> bool:
    """Whether the model's attention takes documents."""
    return str(_text_config(model)._attn_implementation).startswith(PREFIX)


def _text_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config()


def enable_shared_prefix(model: PreTrainedModel) -> None:
    """Let a model's attention take documents; other calls of the model stay as they are."""
    if not is_enabled(model):
        model.set_attn_implementation(PREFIX + str(_text_config(model)._attn_implementation))
