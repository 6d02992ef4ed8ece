import json

import pytest

from lit_align.data.bad_rows import BadRows
from lit_align.data.loading import RowLoader, describe, fingerprint, split_off
from lit_align.data.schema import PreferenceRow, SFTRow
from lit_align.data.tokenize import RowTokenizer
from lit_align.errors import DataError
from tests.tiny_models import tiny_tokenizer

TOKENIZE = RowTokenizer(tiny_tokenizer(), 64)


def load(rows, **settings):
    bad_rows = BadRows()
    loader = RowLoader(type(rows[0]), TOKENIZE, **settings)
    return loader.from_rows(rows, "rows", bad_rows), bad_rows


def test_every_kind_of_bad_row_is_counted(tmp_path):
    good = {"prompt": "q", "chosen": " a", "rejected": " b"}
    bad = {
        "chosen and rejected are identical": {**good, "rejected": " a"},
        "no response": {**good, "chosen": ""},
        "empty prompt": {**good, "prompt": " "},
        "special token as text": {**good, "prompt": "q <|im_start|>"},
        "longer than max_length 64": {**good, "prompt": "q" * 200},
        "lone surrogate": {**good, "prompt": "\ud800"},
        "control character": {**good, "prompt": "\x00"},
        "roles out of order": {
            **good,
            "prompt": [{"role": "assistant", "content": "x"}],
        },
        "columns fit no known format": {"text": "x"},
    }
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) for row in [good, *bad.values(), good]]
    path.write_bytes("\n".join([*lines, "{"]).encode() + b"\n\xff\n")
    bad_rows = BadRows()
    rows = RowLoader(PreferenceRow, TOKENIZE).from_files([path], bad_rows)
    assert [row.row_id for row in rows] == [0, 1]
    assert [b.reason for b in bad_rows.rows] == [*bad, "not JSON", "not UTF-8"]
    assert [b.line for b in bad_rows.rows] == [*range(2, 11), 12, 13]
    assert bad_rows.rows[0].row == bad["chosen and rejected are identical"]


def test_max_rows_counts_usable_rows():
    rows, bad_rows = load([SFTRow("a", ""), SFTRow("a", "b"), SFTRow("a", "c"), SFTRow("", "d")],
                          max_rows=2)  # fmt: skip
    assert len(rows) == 2 and len(bad_rows) == 1


def test_format_names_are_checked():
    with pytest.raises(DataError, match=r"format is 'parquet': auto \| token_ids"):
        RowLoader(SFTRow, TOKENIZE, format="parquet")


def test_description():
    rows, _ = load([PreferenceRow([5], [6, 7], [8]), PreferenceRow([5] * 60, [6] * 9, [8])])
    assert describe(rows) == (
        "2 rows, 130 tokens, 8 targets, 64 longest, 1 truncated, 0 merged boundaries"
    )


def test_splitting_keeps_a_prompt_on_one_side():
    rows, _ = load([SFTRow([5 + i // 5], [6 + i]) for i in range(100)])
    train, validation = split_off(rows, 0.1, seed=0)
    assert (len(train), len(validation)) == (90, 10)
    prompts = [
        {int(row.sequences[0].prompt_ids[0]) for row in part} for part in (train, validation)
    ]
    assert not prompts[0] & prompts[1]
    assert [row.row_id for row in validation] == list(range(10))
    again = split_off(rows, 0.1, seed=0)[1]
    assert fingerprint(validation) == fingerprint(again) != fingerprint(split_off(rows, 0.1, 1)[1])


def test_the_fingerprint_sees_boundary_role_and_order_but_not_weights():
    base = fingerprint(load([SFTRow([5, 6], [7]), SFTRow([5], [8])])[0])
    assert base == fingerprint(load([SFTRow([5, 6], [7], [0.5]), SFTRow([5], [8])])[0])
    others = [
        [SFTRow([5], [6, 7]), SFTRow([5], [8])],
        [SFTRow([5], [8]), SFTRow([5, 6], [7])],
        [SFTRow([5, 6], [7])],
        [PreferenceRow([5, 6], [7], [8])],
    ]
    assert len({base, *(fingerprint(load(rows)[0]) for rows in others)}) == 5
