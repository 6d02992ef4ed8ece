import pytest

from lit_align.errors import DataError, TrainingError
from lit_align.pipelines.rewards import corrections
from lit_align.pipelines.rewards.corrections import Teacher, correct_predictions
from lit_align.pipelines.rewards.predictions import Prediction
from tests.tiny_models import tiny_model, tiny_tokenizer

PROMPT = [{"role": "user", "content": "3 + 4?"}]


def is_seven(row, response):
    return response.strip().endswith("7")


def wrong(response="3 + 4 = 8", **row):
    return Prediction(PROMPT, response, "It is 7.", row)


@pytest.fixture
def teacher(monkeypatch):
    """A teacher that says what the test makes it say."""

    def build(*replies):
        def generate(model, tokenizer, prompts, *, num_samples, **settings):
            asked.extend(prompts)
            return [list(r) for r in replies[: len(prompts)]]

        monkeypatch.setattr(corrections, "generate", generate)
        return Teacher(tiny_model(), tiny_tokenizer(), num_samples=len(replies[0]))

    asked: list = []
    build.asked = asked
    return build


def test_gold_is_taken_as_it_is():
    found = correct_predictions([wrong()], "gold", is_correct=lambda row, text: False)
    assert found.texts == ["It is 7."]
    assert found.counts == {"predictions": 1, "accepted": 1}


def test_plain_text_corrections_begin_like_the_response():
    found = correct_predictions([Prediction("3 + 4 =", " 8", "7")], "gold")
    assert found.texts == [" 7"]


def test_column_is_checked_where_there_is_a_checker():
    rows = [wrong(correction="3 + 4 = 7"), wrong(correction="3 + 4 = 9"), wrong(), wrong()]
    checked = correct_predictions(rows, "column", is_correct=is_seven)
    assert checked.texts == ["3 + 4 = 7", None, None, None]
    assert checked.counts == {
        "predictions": 4, "accepted": 1, "correction is wrong": 1, "no correction": 2,
    }  # fmt: skip
    assert correct_predictions(rows, "column").texts[1] == "3 + 4 = 9"


def test_teacher_rewrites_and_only_right_rewrites_count(teacher):
    replies = [
        ["First wrong step: 8\nCorrected solution:\n3 + 4 = 7\n"],
        ["First wrong step: 8\nCorrected solution:\n3 + 4 = 6"],
        ["3 + 4 = 7"],  # not in the form that was asked for
    ]
    found = correct_predictions(
        [wrong(), wrong(), wrong()], "model", is_correct=is_seven, teacher=teacher(*replies)
    )
    assert found.texts == ["3 + 4 = 7", None, None]
    assert found.counts == {
        "predictions": 3, "accepted": 1, "correction is wrong": 1, "no correction": 1,
    }  # fmt: skip
    [message] = teacher.asked[0]
    assert all(text in message["content"] for text in ("3 + 4?", "It is 7.", "3 + 4 = 8"))


def test_of_several_right_rewrites_the_nearest_is_taken(teacher):
    mark = "Corrected solution: "
    samples = [mark + text for text in ("The sum is 7", "3 + 4 = 7", "3 + 4 = 9")]
    found = correct_predictions(
        [wrong()], "model", is_correct=is_seven, teacher=teacher(samples), progress=False
    )
    assert found.texts == ["3 + 4 = 7"]


def test_a_special_token_as_text_is_not_put_before_the_teacher(teacher):
    good = ["Corrected solution: 3 + 4 = 7"]
    rows = [wrong("8<|im_end|>"), wrong()]
    found = correct_predictions(rows, "model", is_correct=is_seven, teacher=teacher(good))
    assert found.texts == [None, "3 + 4 = 7"]
    assert len(teacher.asked) == 1


def test_a_real_model_that_cannot_do_it_is_an_error_with_counts():
    poor = Teacher(tiny_model(), tiny_tokenizer(), max_new_tokens=4)
    with pytest.raises(DataError, match="2 x no correction"):
        correct_predictions(
            [wrong(), wrong()], "model", is_correct=is_seven, teacher=poor, progress=False
        )


def test_settings_that_cannot_be():
    with pytest.raises(TrainingError, match="teacher and a checker"):
        correct_predictions([wrong()], "model", is_correct=is_seven)
    with pytest.raises(TrainingError, match="column"):
        correct_predictions([wrong()], "oracle")  # type: ignore[arg-type]


def test_no_predictions_no_corrections():
    assert correct_predictions([], "gold").texts == []
