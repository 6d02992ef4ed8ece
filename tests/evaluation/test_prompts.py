import pytest

from lit_align.errors import DataError
from lit_align.evaluation import (
    encode_prompt,
    encode_response,
    extract_choice,
    question_prompt,
    target_response,
)
from tests.tiny_models import tiny_tokenizer

QA = {
    "question": "Where?", "choices": ["here", "there"], "answer_index": 1, "rationale": "Not\nhere."
}  # fmt: skip


def test_choices_are_listed_by_letter():
    (message,) = question_prompt(QA)
    assert message["role"] == "user"
    lines = ["Where?", "A. here", "B. there", 'End with "The answer is: ..."']
    assert message["content"].splitlines() == lines


def test_a_word_problem_stands_alone():
    assert question_prompt({"question": " 3 + 4? "}) == [{"role": "user", "content": "3 + 4?"}]


def test_own_prompt_is_taken_as_it_is_and_a_row_without_either_is_an_error():
    assert question_prompt({"prompt": "Once upon", "question": "x"}) == "Once upon"
    with pytest.raises(DataError, match="neither"):
        question_prompt({"id": 3})


def test_targets_end_with_the_answer():
    assert target_response(QA) == "Not here. The answer is: there"
    assert extract_choice(target_response(QA), QA["choices"]) == 1
    assert target_response({**QA, "rationale": None}) == "The answer is: there"
    long = target_response({**QA, "rationale": "word " * 100})
    assert long.count("word") == 40
    solved = {"solution": "1 + 1 = 2. The answer is: 2", "final_answer": "2"}
    assert target_response(solved) == solved["solution"]
    assert target_response({**solved, "solution": "1 + 1 = 2."}) == solved["solution"]
    with pytest.raises(DataError, match="final_answer"):
        target_response({"question": "?"})


def test_chat_prompt_ends_where_the_answer_begins():
    tokenizer = tiny_tokenizer()
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "Tom"}])
    assert tokenizer.decode(ids) == "<|im_start|>user\nTom<|im_end|>\n<|im_start|>assistant\n"


def test_response_has_no_special_tokens():
    tokenizer = tiny_tokenizer()
    ids = encode_response(tokenizer, "a<|im_end|>b")
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids) == "a<|im_end|>b"


def test_token_ids_are_taken_as_they_are():
    assert encode_prompt(tiny_tokenizer(), [5, 6, 2]) == [5, 6, 2]
