"""Tokenised rows → one `PackedBatch`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lit_align.data.batch import PackedBatch
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
    row_ids = [row.row_id for row in rows for _ in row.sequences]
    lengths = torch.tensor([sequence.num_tokens for sequence in sequences])
    num_targets = torch.tensor([len(sequence.response_ids) for sequence in sequences])
    longest = int(lengths.max())
    positions = torch.arange(longest).expand(len(sequences), -1)
    target_ids = np.concatenate([sequence.response_ids for sequence in sequences])
    return PackedBatch(
        input_ids=_padded_ids(sequences, longest, pad_id),
        position_ids=positions.contiguous(),
        attention_mask=(positions < lengths[:, None]).long(),
        hidden_index=_hidden_index(lengths, num_targets, longest),
        target_ids=torch.from_numpy(target_ids.astype(np.int64)),
        sequence_index=torch.repeat_interleave(torch.arange(len(sequences)), num_targets),
        token_weights=_token_weights(sequences, row_ids),
        sequence_roles=torch.tensor([sequence.role for sequence in sequences]),
        row_ids=torch.tensor(row_ids),
        ref_per_token_logps=_reference_logps(sequences),
    )


def _padded_ids(sequences: Sequence[TokenizedSequence], longest: int, pad_id: int) -> Tensor:
    """(S, longest) int64."""
    input_ids = np.full((len(sequences), longest), pad_id, np.int64)
    for line, sequence in zip(input_ids, sequences, strict=True):
        prompt_length = len(sequence.prompt_ids)
        line[:prompt_length] = sequence.prompt_ids
        line[prompt_length : sequence.num_tokens] = sequence.response_ids
    return torch.from_numpy(input_ids)


def _hidden_index(lengths: Tensor, num_targets: Tensor, longest: int) -> Tensor:
    """(N,) flat positions of the hidden states before each target.

    The n targets of sequence s end its `length` tokens, so their predictors are positions
    length - n - 1 ... length - 2 of row s.
    """
    first = torch.arange(len(lengths)) * longest + lengths - num_targets - 1
    before = torch.cumsum(num_targets, 0) - num_targets
    total = int(num_targets.sum())
    return torch.repeat_interleave(first - before, num_targets) + torch.arange(total)


def _token_weights(sequences: Sequence[TokenizedSequence], row_ids: Sequence[int]) -> Tensor:
    """(N,) fp32."""
    parts = []
    for sequence, row_id in zip(sequences, row_ids, strict=True):
        if row_id == FILLER_ROW_ID:
            parts.append(np.zeros(len(sequence.response_ids), np.float32))
        elif sequence.token_weights is None:
            parts.append(np.ones(len(sequence.response_ids), np.float32))
        else:
            parts.append(sequence.token_weights)
    return torch.from_numpy(np.concatenate(parts))


def _reference_logps(sequences: Sequence[TokenizedSequence]) -> Tensor | None:
    """(N,) fp32, or None where no sequence has them; they are known for all or for none."""
    known = [s.ref_per_token_logps for s in sequences if s.ref_per_token_logps is not None]
    if not known:
        return None
    if len(known) != len(sequences):
        raise ValueError("reference log-probs are known for some sequences of the batch only")
    return torch.from_numpy(np.concatenate(known))
