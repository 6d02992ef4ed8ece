import contextlib

import pytest

from lit_align.data.bad_rows import BadRowError
from lit_align.data.formats import (
    FORMATS,
    PREFERENCE_FORMATS,
    SFT_FORMATS,
    UNLEARNING_FORMATS,
    parse_row,
)
from lit_align.data.schema import PreferenceRow, SFTRow, UnlearningRow
from lit_align.data.validate import check_row


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


Q, GOOD, BAD = [user("q")], [assistant("good")], [assistant("bad")]

PAIRS = {
    "standard": {"prompt": "q", "chosen": " good", "rejected": " bad"},
    "conversational": {"prompt": Q, "chosen": GOOD, "rejected": BAD},
    "text responses to messages": {"prompt": Q, "chosen": "good", "rejected": "bad"},
    "a text prompt beside whole conversations": {
        "prompt": "q", "chosen": Q + GOOD, "rejected": Q + BAD,
    },
    "implicit conversational": {"chosen": Q + GOOD, "rejected": Q + BAD},
    "transcript": {
        "chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad",
    },
    "ALLO": {"question": "q", "solution": "good", "prediction": "bad", "is_correct": False},
    "RLMEC": {"problem": "q", "solution": "good", "prediction": "bad"},
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_preference_formats(name):
    expected = PreferenceRow(Q, GOOD, BAD)
    if name == "standard":
        expected = PreferenceRow("q", " good", " bad")
    assert parse_row(PAIRS[name], PREFERENCE_FORMATS) == expected


def test_the_implicit_prompt_of_texts_ends_before_the_last_space():
    row = {"chosen": "The sky is blue", "rejected": "The sky is green"}
    expected = PreferenceRow("The sky is", " blue", " green")
    assert parse_row(row, PREFERENCE_FORMATS) == expected


def test_a_transcript_with_many_turns():
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    row = parse_row({"chosen": start + " d", "rejected": start + " e"}, PREFERENCE_FORMATS)
    assert row.prompt == [user("a"), assistant("b"), user("c")]
    assert (row.chosen, row.rejected) == ([assistant("d")], [assistant("e")])


def test_token_ids_and_weights_of_a_pair():
    columns = {
        "prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3],
        "chosen_token_weights": [1.0], "rejected_token_weights": [0.5],
    }  # fmt: skip
    expected = PreferenceRow([1], [2], [3], [1.0], [0.5])
    assert parse_row(columns, PREFERENCE_FORMATS) == expected


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"messages": Q + GOOD}, SFTRow(Q, GOOD)),
        ({"prompt": "q", "completion": " a"}, SFTRow("q", " a")),
        ({"prompt": Q, "completion": GOOD}, SFTRow(Q, GOOD)),
        ({"prompt": "q", "response": " a", "token_weights": [1]}, SFTRow("q", " a", [1])),
        ({"instruction": "q", "input": "", "output": "good"}, SFTRow(Q, GOOD)),
        ({"instruction": "q", "input": "x", "output": "good"}, SFTRow([user("q\n\nx")], GOOD)),
        ({"question": "q", "solution": "good", "final_answer": "1"}, SFTRow(Q, GOOD)),
        ({"input": "q", "output": " a"}, SFTRow("q", " a")),
        ({"prompt_ids": [1], "response_ids": [2]}, SFTRow([1], [2])),
    ],
)
def test_sft_formats(columns, expected):
    assert parse_row(columns, SFT_FORMATS) == expected


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"prompt": "q", "response": " a"}, UnlearningRow("q", " a")),
        ({"prompt": "q", "response": " a", "retain": True}, UnlearningRow("q", " a", None, True)),
        ({"messages": Q + GOOD, "retain": True}, UnlearningRow(Q, GOOD, None, True)),
        (
            {"input": "q", "output": " a", "reward": [0.1, 0.9]},
            UnlearningRow("q", " a", [0.1, 0.9]),
        ),
        (PAIRS["conversational"], UnlearningRow(Q, BAD)),
        ({**PAIRS["standard"], "rejected_token_weights": [2]}, UnlearningRow("q", " bad", [2])),
        ({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}, UnlearningRow([1], [3])),
        ({"prompt_ids": [1], "response_ids": [3]}, UnlearningRow([1], [3])),
        (PAIRS["ALLO"], UnlearningRow(Q, BAD)),
        (
            {"question": "q", "prediction": "good", "is_correct": True},
            UnlearningRow(Q, GOOD, None, True),
        ),
    ],
)
def test_unlearning_formats(columns, expected):
    assert parse_row(columns, UNLEARNING_FORMATS) == expected


def test_a_format_can_be_named():
    columns = {"messages": Q + GOOD, "prompt": "p", "completion": "c"}
    assert parse_row(columns, SFT_FORMATS, "prompt_completion") == SFTRow("p", "c")
    with pytest.raises(BadRowError, match="a column is missing for format alpaca"):
        parse_row(columns, SFT_FORMATS, "alpaca")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("junk", [None, 3, [], [3], {}, [None], [{}], [[]], "x"])
def test_junk_is_a_bad_row_or_a_row_never_a_crash(kind, junk):
    names = {name for columns in PAIRS.values() for name in columns}
    names |= {"messages", "completion", "response", "output", "instruction", "input", "reward"}
    names |= {"prompt_ids", "chosen_ids", "rejected_ids", "response_ids", "token_weights", "retain"}
    for formats in [f.name for f in FORMATS[kind]] + ["auto"]:
        for good in [
            dict.fromkeys(names, junk),
            *({**c, n: junk} for c in PAIRS.values() for n in c),
        ]:
            with contextlib.suppress(BadRowError):
                check_row(parse_row(good, FORMATS[kind], formats))


def test_unknown_columns():
    with pytest.raises(BadRowError, match=r"no known format \(text\)"):
        parse_row({"text": "x"}, PREFERENCE_FORMATS)
    with pytest.raises(BadRowError, match="prediction is correct"):
        parse_row({**PAIRS["ALLO"], "is_correct": True}, PREFERENCE_FORMATS)
