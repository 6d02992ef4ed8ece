import pytest

from lit_align.errors import DataError
from lit_align.pipelines.rewards.predictions import Prediction


def test_from_a_pipelines_row():
    prompt = [{"role": "user", "content": " 3 + 4? "}]
    row = {"id": "a", "prompt": prompt, "target": "3 + 4 = 7", "response": "3 + 4 = 8"}
    prediction = Prediction.from_row(row)
    assert prediction == Prediction(prompt, "3 + 4 = 8", "3 + 4 = 7", row)
    assert prediction.problem == "3 + 4?"
    assert prediction.as_prompt("x") == [{"role": "user", "content": "x"}]
    assert prediction.as_response("x") == [{"role": "assistant", "content": "x"}]
    assert Prediction.from_row(row, "9").response == "9"


def test_from_a_preference_row_of_messages():
    def turn(role, text):
        return {"role": role, "content": text}

    prompt = [turn("system", "Be brief."), turn("user", "Hello"), turn("assistant", "Hi")]
    prompt.append(turn("user", "3 + 4?"))
    row = {"prompt": prompt, "target": [turn("assistant", "7")]}
    prediction = Prediction.from_row(row, [turn("assistant", "8")])
    assert (prediction.response, prediction.solution) == ("8", "7")
    assert prediction.problem == "System: Be brief.\n\nUser: Hello\n\nAssistant: Hi\n\nUser: 3 + 4?"


def test_plain_text_stays_plain_text():
    prediction = Prediction("Q: 3 + 4?\nA:", " 8", " 7")
    assert prediction.as_prompt("x") == prediction.as_response("x") == "x"
    assert prediction.in_place("7\n") == " 7"
    assert prediction.in_place("\n7") == " 7"


@pytest.mark.parametrize("prompt", [[], [1, 2, 3]])
def test_token_ids_cannot_be_quoted(prompt):
    with pytest.raises(DataError, match="text or chat messages"):
        Prediction(prompt, "8", "7")


def test_a_response_of_token_ids_is_refused():
    with pytest.raises(DataError, match="text or a message"):
        Prediction.from_row({"prompt": "3 + 4?", "target": "7"}, [5, 6])
