"""Tokenised rows → one packed row in which what a row's sequences begin with stands once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch

from lit_align.batch import PackedBatch
from lit_align.data.packing import collate, joined, target_fields
from lit_align.data.schema import TokenizedRow, TokenizedSequence
from lit_align.errors import DataError

Layout: TypeAlias = Literal["padded", "shared_prefix"]


def collator(layout: Layout, pad_id: int) -> Callable[[Sequence[TokenizedRow]], PackedBatch]:
    """What makes a batch of rows in a layout."""
    return pack if layout == "shared_prefix" else functools.partial(collate, pad_id=pad_id)


def pack(rows: Sequence[TokenizedRow]) -> PackedBatch:
    """Put rows into the shared_prefix layout: one row of the batch, without padding.

    A row's tokens are the longest common prefix of its sequences, then the rest of each. The last
    token of a sequence is no input: its hidden state would predict nothing.

    Args:
        rows: at least one.
    """
    parts = [_Packed(row) for row in rows]
    starts = np.cumsum([0, *(part.num_tokens for part in parts)])
    positions = [place for part in parts for place in part.positions]
    predictors = [
        start + index
        for start, part in zip(starts, parts, strict=False)
        for index in part.predictors
    ]
    input_ids = joined([ids for part in parts for ids in part.ids], np.int64)[None]
    return PackedBatch(
        input_ids=input_ids,
        position_ids=joined(positions, np.int64)[None],
        attention_mask=torch.ones_like(input_ids),
        hidden_index=joined(predictors, np.int64),
        **target_fields(rows),
        documents=tuple(document for part in parts for document in part.documents),
    )


def packed_lengths(rows: Sequence[TokenizedRow], max_tokens: int, split: str) -> list[int]:
    """Tokens of each row in this layout: the common prefix once, and every branch.

    Raises:
        DataError: a row has more than max_tokens.
    """
    lengths = [_packed_length(row.sequences) for row in rows]
    for row, length in zip(rows, lengths, strict=True):
        if length > max_tokens:
            raise DataError(
                f"{split} row {row.row_id} has {length} tokens, what its sequences begin with "
                f"counted once, and max_tokens is {max_tokens}: raise it, or lower max_length"
            )
    return lengths


def _packed_length(sequences: Sequence[TokenizedSequence]) -> int:
    prefix = _common_prefix(sequences)
    return prefix + sum(sequence.num_tokens - 1 - prefix for sequence in sequences)


class _Packed:
    """One row's part of the packed row."""

    def __init__(self, row: TokenizedRow) -> None:
        prefix = _common_prefix(row.sequences)
        inputs = [_inputs(sequence) for sequence in row.sequences]
        branches = [ids[prefix:] for ids in inputs]
        self.ids = [inputs[0][:prefix], *branches]
        self.positions = [np.arange(prefix), *(np.arange(prefix, len(ids)) for ids in inputs)]
        self.num_tokens = sum(map(len, self.ids))
        self.documents = _documents(prefix, [len(branch) for branch in branches])
        self.predictors = []
        start = prefix
        for ids, sequence in zip(inputs, row.sequences, strict=True):
            places = np.arange(len(sequence.prompt_ids) - 1, len(ids))
            # In the prefix a place is its index; in the branch, `start` stands for the prefix's end
            self.predictors.append(np.where(places < prefix, places, places - prefix + start))
            start += len(ids) - prefix


def _documents(prefix: int, branches: Sequence[int]) -> list[tuple[int, ...]]:
    """What attends to itself alone, as lengths of (prefix, branch, ...); without empty ones."""
    branches = [length for length in branches if length]
    if prefix == 0:
        return [(length,) for length in branches]
    if len(branches) == 1:  # goes straight on: nothing to keep apart
        return [(prefix + branches[0],)]
    return [(prefix, *branches)]


def _inputs(sequence: TokenizedSequence) -> np.ndarray:
    """Ids of all tokens but the last."""
    return np.concatenate([sequence.prompt_ids, sequence.response_ids[:-1]])


def _common_prefix(sequences: Sequence[TokenizedSequence]) -> int:
    """Number of input tokens that all of them begin with."""
    first, *others = map(_inputs, sequences)
    length = len(first)
    for other in others:
        length = min(length, len(other))
        (differing,) = np.nonzero(first[:length] != other[:length])
        length = int(differing[0]) if len(differing) else length
    return length
