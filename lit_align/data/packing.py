"""Tokenised rows → one `PackedBatch`.

In numpy until the end: torch would start its threads for each of these few small operations.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_align.batch import PackedBatch
from lit_align.data.schema import TokenizedRow, TokenizedSequence

FILLER_ROW_ID = -1


def collate(rows: Sequence[TokenizedRow], pad_id: int) -> PackedBatch:
    """Put rows into the padded layout: every sequence is one row of the batch, padded on the right.

    Targets are the response tokens; the hidden state of the token before each one predicts it. A
    filler row's (row id -1) token weights are zero.

    Args:
        rows: at least one.
        pad_id: token id to pad with; never read by a loss.
    """
    sequences = [sequence for row in rows for sequence in row.sequences]
    lengths = np.array([sequence.num_tokens for sequence in sequences])
    num_targets = np.array([len(sequence.response_ids) for sequence in sequences])
    positions = np.tile(np.arange(lengths.max()), (len(sequences), 1))
    return PackedBatch(
        input_ids=_padded_ids(sequences, lengths.max(), pad_id),
        position_ids=torch.from_numpy(positions),
        attention_mask=torch.from_numpy((positions < lengths[:, None]).astype(np.int64)),
        hidden_index=_hidden_index(lengths, num_targets),
        **target_fields(rows),
    )


def target_fields(rows: Sequence[TokenizedRow]) -> dict[str, Any]:
    """What a batch says of its targets and sequences, the same in every layout."""
    sequences = [sequence for row in rows for sequence in row.sequences]
    row_ids = [row.row_id for row in rows for _ in row.sequences]
    num_targets = [len(sequence.response_ids) for sequence in sequences]
    return {
        "target_ids": joined([sequence.response_ids for sequence in sequences], np.int64),
        "sequence_index": torch.from_numpy(np.repeat(np.arange(len(sequences)), num_targets)),
        "token_weights": joined(map(_weights, sequences, row_ids), np.float32),
        "sequence_roles": torch.tensor([sequence.role for sequence in sequences]),
        "row_ids": torch.tensor(row_ids),
        "ref_per_token_logps": _reference_logps(sequences),
    }


def _padded_ids(sequences: Sequence[TokenizedSequence], longest: int, pad_id: int) -> Tensor:
    """(S, longest) int64."""
    input_ids = np.full((len(sequences), longest), pad_id, np.int64)
    for line, sequence in zip(input_ids, sequences, strict=True):
        prompt_length = len(sequence.prompt_ids)
        line[:prompt_length] = sequence.prompt_ids
        line[prompt_length : sequence.num_tokens] = sequence.response_ids
    return torch.from_numpy(input_ids)


def _hidden_index(lengths: np.ndarray, num_targets: np.ndarray) -> Tensor:
    """(N,) flat positions of the hidden states before each target.

    The n targets of sequence s end its `length` tokens, so their predictors are positions
    length - n - 1 ... length - 2 of row s.
    """
    first = np.arange(len(lengths)) * lengths.max() + lengths - num_targets - 1
    before = np.cumsum(num_targets) - num_targets
    return torch.from_numpy(np.repeat(first - before, num_targets) + np.arange(num_targets.sum()))


def _weights(sequence: TokenizedSequence, row_id: int) -> np.ndarray:
    """(N,) weights of one sequence."""
    if row_id == FILLER_ROW_ID:
        return np.zeros(len(sequence.response_ids))
    if sequence.token_weights is None:
        return np.ones(len(sequence.response_ids))
    return sequence.token_weights


def _reference_logps(sequences: Sequence[TokenizedSequence]) -> Tensor | None:
    """(N,) fp32, or None where no sequence has them; they are known for all or for none."""
    known = [s.ref_per_token_logps for s in sequences if s.ref_per_token_logps is not None]
    if not known:
        return None
    if len(known) != len(sequences):
        raise ValueError("reference log-probs are known for some sequences of the batch only")
    return joined(known, np.float32)


def joined(parts: Iterable[np.ndarray], dtype: type) -> Tensor:
    """The parts, one after another."""
    return torch.from_numpy(np.concatenate(list(parts)).astype(dtype))
