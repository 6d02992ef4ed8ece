import re

import pytest

from lit_align import gguf_alias
from lit_align.errors import PipelineError
from lit_align.evaluation import extract_final_answer, target_response
from lit_align.language_model import load_tokenizer
from lit_align.pipelines.word_problems import SHAPES, word_problems


def _numbers(row):
    return {int(number) for number in re.findall(r"\d+", row["question"])}


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_step_is_right_and_the_answer_is_the_last_result(split):
    rows = word_problems(600, split)
    for row in rows:
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)\.", row["solution"])
        assert 1 <= len(steps) <= 2
        for left, sign, right, result in steps:
            assert eval(f"{left} {sign} {right}") == int(result) > 0, row
        assert row["final_answer"] == steps[-1][3]
        assert extract_final_answer(row["solution"]) == row["final_answer"]
        assert target_response(row) == row["solution"]
        # Every number of the question is used, and used once.
        used = [int(x) for step in steps for x in (step[0], step[2])]
        given = [int(x) for x in re.findall(r"\d+", row["question"])]
        assert sorted(given) == sorted(used[:2] + used[3:]), row
    assert len({row["question"] for row in rows}) == len({row["id"] for row in rows}) == 600


def test_splits_share_neither_templates_nor_numbers():
    train = {story for shape in SHAPES for story in shape.train}
    held_out = {story for shape in SHAPES for story in shape.held_out}
    assert not train & held_out and len(train | held_out) >= 24
    numbers = [set().union(*map(_numbers, word_problems(500, s))) for s in ("train", "held_out")]
    assert not numbers[0] & numbers[1]


def test_same_arguments_same_rows_and_more_rows_extend_them():
    assert word_problems(50, seed=3) == word_problems(80, seed=3)[:50]
    assert word_problems(50, seed=3) != word_problems(50, seed=4)
    first = word_problems(1, "held_out")[0]  # a change here changes everybody's data
    assert first == FIRST_HELD_OUT


def test_every_template_has_its_share():
    rows = word_problems(len([s for shape in SHAPES for s in shape.train]) * 3)
    two_steps = sum(row["solution"].count("=") == 2 for row in rows)
    assert two_steps == 3 * sum(len(s.train) for s in SHAPES if len(s.ranges) == 3)


def test_too_many_problems_and_unknown_split_are_errors():
    with pytest.raises(PipelineError, match="split"):
        word_problems(1, "test")


def test_lengths_in_the_default_model_tokens(monkeypatch):
    if not gguf_alias.cache_dir().is_dir():
        pytest.skip("the embedded model is not in the cache; not downloaded by a test")
    tokenizer = load_tokenizer(gguf_alias.ALIAS)
    for row in word_problems(200) + word_problems(200, "held_out"):
        assert len(tokenizer(row["question"])["input_ids"]) <= 50, row
        assert len(tokenizer(row["solution"])["input_ids"]) + 1 <= 40, row


FIRST_HELD_OUT = {
    "id": "held_out-0-0",
    "question": "A hall has 7 rows of 10 seats, and 14 seats are taken. How many seats are free?",
    "solution": "7 * 10 = 70. 70 - 14 = 56. The answer is: 56",
    "final_answer": "56",
}
