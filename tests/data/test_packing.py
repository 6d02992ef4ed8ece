import dataclasses

import numpy as np
import pytest
import torch

from lit_align.batch import CHOSEN, REJECTED
from lit_align.data.packing import collate
from lit_align.data.schema import TokenizedRow, TokenizedSequence
from tests.tiny_models import tiny_model


def sequence(prompt_ids, response_ids, weights=None, role=CHOSEN):
    return TokenizedSequence(prompt_ids, response_ids, weights, role)


PAIR = TokenizedRow(7, (sequence([5, 6], [7, 8, 9]), sequence([5, 6], [10], [0.25], REJECTED)))


def test_numbers_by_hand():
    other = TokenizedRow(3, (sequence([11], [12]), sequence([11], [13, 14], None, REJECTED)))
    batch = collate([PAIR, other], pad_id=0)
    assert batch.input_ids.tolist() == [
        [5, 6, 7, 8, 9],
        [5, 6, 10, 0, 0],
        [11, 12, 0, 0, 0],
        [11, 13, 14, 0, 0],
    ]
    assert batch.attention_mask.sum(1).tolist() == [5, 3, 2, 3]
    assert batch.position_ids[2].tolist() == [0, 1, 2, 3, 4]
    assert batch.hidden_index.tolist() == [1, 2, 3, 6, 10, 15, 16]
    assert batch.target_ids.tolist() == [7, 8, 9, 10, 12, 13, 14]
    assert batch.sequence_index.tolist() == [0, 0, 0, 1, 2, 3, 3]
    assert batch.token_weights.tolist() == [1, 1, 1, 0.25, 1, 1, 1]
    assert batch.sequence_roles.tolist() == [CHOSEN, REJECTED, CHOSEN, REJECTED]
    assert batch.row_ids.tolist() == [7, 7, 3, 3]
    assert batch.ref_per_token_logps is None
    assert (batch.num_sequences, batch.num_tokens) == (4, 13)
    assert {batch.input_ids.dtype, batch.hidden_index.dtype, batch.row_ids.dtype} == {torch.int64}
    assert batch.token_weights.dtype == torch.float32


def test_log_probs_of_a_padded_batch_equal_those_of_each_sequence_alone():
    rng = np.random.default_rng(0)
    sequences = [
        sequence(rng.integers(3, 300, p), rng.integers(3, 300, n))
        for p, n in [(4, 7), (1, 1), (9, 3)]
    ]
    batch = collate([TokenizedRow(i, (s,)) for i, s in enumerate(sequences)], pad_id=0)
    model = tiny_model("llama").eval()
    with torch.no_grad():
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
        ).logits
        logps = logits.flatten(0, 1)[batch.hidden_index].log_softmax(-1)
        per_token_logps = logps.gather(1, batch.target_ids[:, None])[:, 0]
        for i, one in enumerate(sequences):
            ids = torch.from_numpy(np.concatenate([one.prompt_ids, one.response_ids])).long()
            alone = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            start = len(one.prompt_ids)
            expected = alone[start - 1 : -1].gather(1, ids[start:, None])[:, 0]
            torch.testing.assert_close(per_token_logps[batch.sequence_index == i], expected)


def test_a_filler_row_has_no_weight():
    filler = dataclasses.replace(PAIR, row_id=-1)
    batch = collate([PAIR, filler], pad_id=0)
    assert batch.row_ids.tolist() == [7, 7, -1, -1]
    assert batch.token_weights.tolist() == [1, 1, 1, 0.25, 0, 0, 0, 0]


def test_reference_log_probs_are_for_all_or_none():
    known = dataclasses.replace(PAIR.sequences[0], ref_per_token_logps=[-1.0, -2.0, -3.0])
    batch = collate([TokenizedRow(0, (known,))], pad_id=0)
    assert batch.ref_per_token_logps.tolist() == [-1, -2, -3]
    with pytest.raises(ValueError, match="some sequences"):
        collate([TokenizedRow(0, (known, PAIR.sequences[1]))], pad_id=0)


def test_to_moves_every_tensor_and_keeps_none():
    moved = collate([PAIR], pad_id=0).to("meta")
    assert moved.input_ids.is_meta and moved.row_ids.is_meta
    assert moved.ref_per_token_logps is None
