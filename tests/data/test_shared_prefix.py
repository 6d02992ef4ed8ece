import dataclasses

import numpy as np
import pytest
import torch

from lit_align.batch import CHOSEN, REJECTED
from lit_align.data import PreferenceDataModule
from lit_align.data.schema import PreferenceRow, TokenizedRow, TokenizedSequence
from lit_align.data.shared_prefix import pack, packed_lengths
from lit_align.errors import DataError
from tests.tiny_models import tiny_tokenizer
from tests.training_runs import preferences


def sequence(prompt_ids, response_ids, weights=None, role=CHOSEN):
    return TokenizedSequence(prompt_ids, response_ids, weights, role)


def pair(chosen, rejected, row_id=0):
    """Each (prompt, response)."""
    return TokenizedRow(row_id, (sequence(*chosen), sequence(*rejected, None, REJECTED)))


def test_numbers_by_hand():
    # Both begin with 5 6 7; their last tokens, 9 and 11, are no inputs.
    one = pair(([5, 6], [7, 8, 9]), ([5, 6], [7, 10, 12, 11]), row_id=7)
    single = TokenizedRow(3, (sequence([13], [14, 15], [0.5, 0.25]),))
    batch = pack([one, single])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 10, 12, 13, 14]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 3, 4, 0, 1]]
    assert batch.attention_mask.tolist() == [[1] * 8]
    assert batch.documents == ((3, 1, 2), (2,))
    assert batch.target_ids.tolist() == [7, 8, 9, 7, 10, 12, 11, 14, 15]
    assert batch.hidden_index.tolist() == [1, 2, 3, 1, 2, 4, 5, 6, 7]
    assert batch.sequence_index.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert batch.token_weights.tolist() == [1] * 7 + [0.5, 0.25]
    assert batch.sequence_roles.tolist() == [CHOSEN, REJECTED, CHOSEN]
    assert batch.row_ids.tolist() == [7, 7, 3]
    assert (batch.num_sequences, batch.num_tokens) == (3, 8)
    assert {batch.input_ids.dtype, batch.hidden_index.dtype} == {torch.int64}
    assert packed_lengths([one, single], 8, "train") == [6, 2]


@pytest.mark.parametrize(
    ("chosen", "rejected", "ids", "documents", "hidden_index"),
    [
        # Prompts that differ from the first token on (`keep_end`) are documents of their own.
        (([1, 2], [3]), ([4, 2], [3]), [1, 2, 4, 2], ((2,), (2,)), [1, 3]),
        # Prompts of unequal length: the common prefix alone is shared.
        (([1, 2], [3, 4]), ([1], [5]), [1, 2, 3], ((3,),), [1, 2, 0]),
        # Nothing after the prompt is an input: nothing branches.
        (([1, 2], [3]), ([1, 2], [4]), [1, 2], ((2,),), [1, 1]),
        # One goes on where the other ends.
        (([1], [2]), ([1], [2, 3]), [1, 2], ((2,),), [0, 0, 1]),
    ],
)
def test_uneven_beginnings(chosen, rejected, ids, documents, hidden_index):
    batch = pack([pair(chosen, rejected)])
    assert batch.input_ids.tolist() == [ids]
    assert batch.documents == documents
    assert batch.hidden_index.tolist() == hidden_index
    assert packed_lengths([pair(chosen, rejected)], 99, "train") == [len(ids)]


def test_reference_log_probs_and_fillers_are_as_in_the_padded_layout():
    row = pair(([1, 2], [3, 4]), ([1, 2], [5]))
    known = tuple(
        dataclasses.replace(s, ref_per_token_logps=np.arange(len(s.response_ids)) - 9.0)
        for s in row.sequences
    )
    batch = pack([TokenizedRow(-1, known)])
    assert batch.ref_per_token_logps.tolist() == [-9, -8, -9]
    assert batch.token_weights.tolist() == [0, 0, 0]
    assert batch.num_tokens == 0
    part = batch.sequences_of_targets(0, 3, 2)
    assert part.documents == batch.documents == batch.to("meta").documents


def test_layouts_of_the_data_modules():
    padded = preferences(4, layout="padded")
    packed = preferences(4, layout="shared_prefix")
    for data in (padded, packed):
        data.setup("fit")
    (a,), (b,) = padded.train_dataloader(), packed.train_dataloader()
    assert a.documents is None and sum(map(sum, b.documents)) == b.input_ids.numel()
    assert b.num_tokens < a.num_tokens
    assert torch.equal(a.target_ids, b.target_ids) and torch.equal(a.row_ids, b.row_ids)


def test_a_token_budget_makes_up_the_batches():
    data = preferences(20, layout="shared_prefix", max_tokens=64, group_by_length=True)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader()) > 1
    assert max(batch.input_ids.numel() for batch in batches) <= 64
    rows = [i for batch in batches for i in batch.row_ids[::2].tolist()]
    assert sorted(rows) == list(range(20))


def test_a_row_above_the_budget_is_named():
    rows = [PreferenceRow([5] * 3, [6], [7]), PreferenceRow([5] * 9, [6, 7], [8, 9])]
    data = PreferenceDataModule.from_rows(
        tiny_tokenizer(), {"train": rows}, layout="shared_prefix", max_tokens=10
    )
    data.setup("fit")
    with pytest.raises(DataError, match=r"train row 1 has 11 tokens.*max_tokens is 10: raise it"):
        data.train_dataloader()


@pytest.mark.parametrize(
    "settings",
    [
        {"layout": "padded"},
        {"layout": "shared_prefix", "streaming": True},
        {"layout": "shared_prefix", "max_tokens": 0},
    ],
)
def test_max_tokens_is_for_packed_rows_that_are_there(settings):
    with pytest.raises(DataError, match="max_tokens"):
        PreferenceDataModule(tiny_tokenizer(), **{"max_tokens": 64} | settings)


def test_unknown_layouts_are_refused():
    with pytest.raises(DataError, match=r"padded \| shared_prefix"):
        PreferenceDataModule(tiny_tokenizer(), layout="dense")
