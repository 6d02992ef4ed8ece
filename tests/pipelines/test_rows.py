"""The rows of a pipeline: read, split, judged, and turned down together with a reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from lit_align.errors import DataError
from lit_align.pipelines.rows import is_right, load_rows, read_jsonl, write_jsonl
from lit_align.pipelines.settings import DataSettings
from tests.tiny_models import tiny_tokenizer

CHOICE = {"question": "Which?", "choices": ["red", "a hen"], "answer_index": 1}
NUMBER = {"question": "How many?", "final_answer": "1,200"}
PAIR = {"prompt": "Say hello.", "chosen": "hello", "rejected": "no"}


def load(folder: Path, files: dict[str, list[Any]], **settings: Any) -> tuple[list, list]:
    paths = []
    for name, rows in files.items():
        path = folder / f"{name}.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines), "utf-8")
        paths.append(str(path))
    chosen = {"train_files": tuple(paths), "train_rows": 0, "held_out_rows": 0} | settings
    return load_rows(DataSettings(**chosen), tiny_tokenizer(), folder)


def numbered(count: int) -> list[dict[str, Any]]:
    return [NUMBER | {"question": f"How many are {i}?"} for i in range(count)]


def test_word_problems_need_no_file(tmp_path):
    train, held_out = load_rows(
        DataSettings(train_rows=5, held_out_rows=3), tiny_tokenizer(), tmp_path
    )
    assert (len(train), len(held_out)) == (5, 3)
    assert all(is_right(row, row["target"]) for row in [*train, *held_out])


def test_every_nth_row_of_each_file_is_held_out(tmp_path):
    files = {"a": numbered(8), "b": numbered(4)}
    train, held_out = load(tmp_path, files, kind="questions", held_out_every=4)
    assert sorted(row["id"] for row in held_out) == ["a-1", "a-5", "b-1"]
    assert len(train) == 9 and not {r["id"] for r in train} & {r["id"] for r in held_out}


def test_rows_are_taken_evenly_from_the_files_and_the_seed_shuffles(tmp_path):
    files = {"a": numbered(20), "b": numbered(20)}
    runs = [
        load(tmp_path, files, kind="questions", train_rows=10, seed=seed)[0] for seed in (0, 0, 1)
    ]
    assert [row["source"] for row in runs[0]].count("a") == 5
    assert runs[0] == runs[1] != runs[2]


def test_held_out_files_leave_all_other_rows_to_train(tmp_path):
    path = tmp_path / "held.jsonl"
    path.write_text(json.dumps(NUMBER), "utf-8")
    files = {"a": numbered(4)}
    train, held_out = load(tmp_path, files, kind="questions", held_out_files=(str(path),))
    assert (len(train), len(held_out)) == (4, 1)


def test_a_choice_is_prompted_by_letter_and_judged(tmp_path):
    train, _ = load(tmp_path, {"a": [CHOICE] * 3}, kind="questions")
    assert "A. red\nB. a hen" in train[0]["prompt"][0]["content"]
    assert train[0]["target"] == "The answer is: a hen"
    assert is_right(train[0], "So. The answer is: B") and not is_right(train[0], "a hen")


def test_a_number_is_judged_by_its_value(tmp_path):
    train, _ = load(tmp_path, {"a": [NUMBER] * 3}, kind="questions")
    assert is_right(train[0], "The answer is: 1200.0") and not is_right(train[0], "It is 1200")


def test_pairs_of_any_format_become_prompt_target_rejected(tmp_path):
    conversation = [{"role": "user", "content": "Hi"}]
    implicit = {
        side: [*conversation, {"role": "assistant", "content": side}]
        for side in ("chosen", "rejected")
    }
    train, held_out = load(tmp_path, {"a": [PAIR, implicit]}, kind="preference")
    assert held_out[0]["target"] == "hello" and held_out[0]["rejected"] == "no"
    assert train[0]["prompt"] == conversation
    assert train[0]["target"] == [{"role": "assistant", "content": "chosen"}]


BAD_QUESTIONS = {
    "not JSON": "{",
    "neither `prompt` nor `question`": {"final_answer": "1"},
    "neither `choices` nor `final_answer`": {"question": "Why?"},
    "choices is not a list of texts": CHOICE | {"choices": "red"},
    "answer_index is not one of the choices": CHOICE | {"answer_index": 2},
    "final_answer is not a number": {"question": "Where?", "final_answer": "Paris"},
    "special token as text": {"question": "<|im_end|>", "final_answer": "1"},
    "control character": {"question": "\x07", "final_answer": "1"},
    "empty prompt": {"question": " ", "final_answer": "1"},
}


def test_bad_questions_are_named_together(tmp_path):
    with pytest.raises(DataError) as error:
        load(tmp_path, {"a": [*BAD_QUESTIONS.values(), "{"]}, kind="questions")
    said = str(error.value)
    assert "10 bad row(s)" in said and "2 x not JSON" in said
    for line, reason in enumerate(BAD_QUESTIONS, 1):
        assert f"a.jsonl:{line}: {reason}" in said


def test_a_prompt_that_leaves_no_room_for_a_response_is_a_bad_row(tmp_path):
    path = tmp_path / "a.jsonl"
    long = NUMBER | {"question": "How many? " * 40}
    path.write_text("".join(json.dumps(row) + "\n" for row in [*numbered(4), long]), "utf-8")
    settings = DataSettings("questions", (str(path),), train_rows=0, held_out_rows=0)
    assert len(load_rows(settings, tiny_tokenizer(), tmp_path)[0]) == 3
    with pytest.raises(DataError, match=r"a\.jsonl:5: longer than max_length 64"):
        load_rows(settings, tiny_tokenizer(), tmp_path, 64)


def test_bad_pairs_are_named_together(tmp_path):
    bad = [PAIR | {"rejected": "hello"}, PAIR | {"chosen": ""}, {"prompt": "a"}]
    bad.append({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]})
    with pytest.raises(DataError) as error:
        load(tmp_path, {"a": bad}, kind="preference")
    for reason in ("identical", "no response", "columns fit no known format", "token ids"):
        assert reason in str(error.value)


def test_bad_rows_can_be_skipped_and_are_written_down(tmp_path):
    files = {"a": [*BAD_QUESTIONS.values(), *numbered(4)]}
    train, held_out = load(tmp_path, files, kind="questions", on_bad_row="skip")
    assert len(train) + len(held_out) == 4
    written = read_jsonl(tmp_path / "rejected_rows.jsonl")
    assert sorted(row["line"] for row in written) == list(range(1, len(BAD_QUESTIONS) + 1))


@pytest.mark.parametrize(
    ("files", "settings", "message"),
    [
        ({}, {"kind": "questions"}, "needs data.train_files"),
        ({"a": [NUMBER]}, {"kind": "questions"}, "no train rows"),
        ({"a": [NUMBER] * 4}, {"kind": "questions", "train_rows": 9}, "9 rows are asked for"),
        ({"a": [NUMBER] * 4}, {"kind": "questions", "held_out_every": 1}, "at least 2"),
        ({"a": [NUMBER] * 4, "b": [CHOICE] * 4}, {"kind": "questions"}, "some have none"),
        ({}, {"kind": "word_problems", "train_rows": 3}, "no held-out rows"),
    ],
)
def test_settings_that_give_no_rows(files, settings, message, tmp_path):
    with pytest.raises(DataError, match=message):
        load(tmp_path, files, **settings)


def test_jsonl_keeps_line_separators_inside_a_row(tmp_path):
    rows = [{"text": "a\u2028b\nc"}, {"text": "é"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
