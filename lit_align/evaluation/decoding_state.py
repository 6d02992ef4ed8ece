"""Prompts read once: the state from which any number of continuations is generated or scored."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lit_align.errors import ModelError
from lit_align.evaluation.kv_cache import drop_rows, has_full_attention_only, new_cache


@dataclasses.dataclass
class DecodingState:
    """R rows of tokens that the model has read.

    Attributes:
        model: a causal LM in evaluation mode.
        cache: keys and values of C columns.
        attention_mask: (R, C) int64, 1 where a column is a token of the row.
        positions: (R,) int64, the position of the row's next token.
        logits: (R, V) for the row's next token.
    """

    model: PreTrainedModel
    cache: DynamicCache
    attention_mask: Tensor
    positions: Tensor
    logits: Tensor

    def feed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Read T more tokens a row; returns the (R, T, V) logits that follow each of them.

        Args:
            input_ids: (R, T) int64.
            attention_mask: (R, T) int64, 0 for padding on the right; None where there is none.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        position_ids = self.positions[:, None] + attention_mask.cumsum(-1) - attention_mask
        self.attention_mask = torch.cat([self.attention_mask, attention_mask], dim=-1)
        self.positions = self.positions + attention_mask.sum(-1)
        logits = _forward(self.model, self.cache, input_ids, self.attention_mask, position_ids, 0)
        self.logits = logits[:, -1]
        return logits

    def repeat(self, rows: Tensor) -> None:
        """Rows `rows` (int64, repeats allowed) become the rows."""
        self.cache.reorder_cache(cast(torch.LongTensor, rows))
        self._follow(rows)

    def drop(self, finished: Tensor) -> Tensor:
        """Remove the rows where `finished` (R,) is true; returns the old index of each new row."""
        order = drop_rows(self.cache, finished)
        self._follow(order)
        return order

    def _follow(self, rows: Tensor) -> None:
        self.attention_mask = self.attention_mask[rows]
        self.positions = self.positions[rows]
        self.logits = self.logits[rows]


class PromptReader:
    """Reads prompts into `DecodingState`s, and what all of them begin with only once.

    The common beginning is mostly the chat template's system message. It is shared where the model
    takes position ids and has full attention alone: the rows' padding then stands behind it, and a
    sliding window would count that padding as distance.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int):
        if any(not prompt for prompt in prompts):
            raise ModelError("a prompt has no tokens")
        self.model = model
        self.pad_id = pad_id
        self.prefix: list[int] = []
        self.prefix_cache = new_cache(model)
        takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        if len(prompts) > 1 and takes_positions and has_full_attention_only(self.prefix_cache):
            self.prefix = _common_prefix(prompts)
        if self.prefix:
            ids = torch.tensor([self.prefix], device=model.device)
            ones = torch.ones_like(ids)
            _forward(model, self.prefix_cache, ids, ones, ones.cumsum(-1) - 1, 1)

    def read(self, prompts: Sequence[Sequence[int]]) -> DecodingState:
        """The state after the given prompts (some of those that the reader was made for)."""
        model, shared = self.model, len(self.prefix)
        cache = copy.deepcopy(self.prefix_cache)
        if shared:
            rows = torch.zeros(len(prompts), dtype=torch.int64, device=model.device)
            cache.reorder_cache(cast(torch.LongTensor, rows))
        input_ids, attention_mask = left_padded([p[shared:] for p in prompts], self.pad_id)
        input_ids, attention_mask = input_ids.to(model.device), attention_mask.to(model.device)
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0) + shared
        prefix_mask = attention_mask.new_ones(len(prompts), shared)
        whole_mask = torch.cat([prefix_mask, attention_mask], dim=-1)
        logits = _forward(model, cache, input_ids, whole_mask, position_ids, 1)
        return DecodingState(model, cache, whole_mask, whole_mask.sum(-1), logits[:, -1])


def left_padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), both (R, T) int64, with the rows' ends aligned."""
    width = max(map(len, rows))
    input_ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    attention_mask = torch.arange(width) >= width - lengths[:, None]
    return input_ids, attention_mask.long()


def _common_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """What all prompts begin with; every prompt keeps at least one token of its own."""
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    return [column[0] for column in takewhile(lambda c: len(set(c)) == 1, columns)]


def _forward(
    model: PreTrainedModel,
    cache: DynamicCache,
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor,
    logits_to_keep: int,
) -> Tensor:
    """Logits of the last `logits_to_keep` columns (0: of all), through the cache."""
    takes = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"position_ids": position_ids, "logits_to_keep": logits_to_keep}
    return model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        past_key_values=cache,
        use_cache=True,
        **{name: value for name, value in options.items() if name in takes},
    ).logits
