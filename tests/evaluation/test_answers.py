import pytest

from lit_align.evaluation import extract_choice, extract_final_answer, normalise_number

CHOICES = ["drugstore", "a human body", "The valve", "no"]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("3 + 4 = 7. The answer is: 7", "7"),
        ("The answer is: 7.", "7"),
        ("The answer is: 7 apples. The answer is: 8", "7"),
        ("the answer is:  $1,200.50", "1200.5"),
        ("The answer is: -3", "-3"),
        ("The answer is:\n7.0", "7"),
        ("The answer is: .5", "0.5"),
        ("The answer is: seven", None),
        ("3 + 4 = 7", None),
        ("", None),
    ],
)
def test_number_after_the_mark(response, answer):
    assert extract_final_answer(response) == answer


def test_last_number_only_on_request():
    assert extract_final_answer("So 3 + 4 = 7 apples", last_number=True) == "7"
    assert extract_final_answer("none", last_number=True) is None
    assert extract_final_answer("The answer is: 7. Or 8", last_number=True) == "7"


def test_one_spelling_a_number():
    spelled = {"7.0": "7", "007": "7", "-0": "0", "1,000,000": "1000000", "0.50": "0.5", "+3": "3"}
    assert {text: normalise_number(text) for text in spelled} == spelled
    assert normalise_number(" Yes ") == "yes"
    assert normalise_number("100") == "100"  # not 1E+2


@pytest.mark.parametrize(
    ("response", "choice"),
    [
        ("The answer is: drugstore", 0),
        ("It is so. The answer is: Drugstore.", 0),
        ("The answer is: human body", 1),
        ("The answer is: B", 1),
        ("The answer is: (C)", 2),
        ("The answer is: C. the valve", 2),
        ("The answer is: C. drugstore", None),
        ("The answer is: F", None),
        ("The answer is: not a choice", None),
        ("The answer is: no\nThe answer is: B", 3),
        ("drugstore", None),
        ("The answer is:", None),
    ],
)
def test_choice_by_text_or_letter(response, choice):
    assert extract_choice(response, CHOICES) == choice
