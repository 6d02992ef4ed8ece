import pytest
import torch

from lit_align.errors import DataError
from lit_align.evaluation import encode_prompt, evaluate, tasks
from tests.tiny_models import tiny_model, tiny_tokenizer

PROBLEMS = [
    {"id": "a", "question": "3 + 4?", "final_answer": "7"},
    {"id": "b", "question": "3 + 5?", "final_answer": "8.0"},
    {"id": "c", "question": "3 + 6?", "final_answer": "9"},
]
QA = [
    {"id": i, "question": f"Where {i}?", "choices": ["apples", "Tom", "pages and more"],
     "answer_index": i % 3}
    for i in range(6)
]  # fmt: skip
PAIRS = [
    {"id": 0, "prompt": "Tom has", "chosen": " apples", "rejected": " the lazy dog"},
    {"id": 1, "prompt": [{"role": "user", "content": "Hi"}],
     "chosen": [{"role": "assistant", "content": "Mia"}],
     "rejected": [{"role": "assistant", "content": "fox"}]},
]  # fmt: skip


@pytest.fixture(scope="module")
def lm():
    return tiny_model("llama").eval(), tiny_tokenizer()


def _say(monkeypatch, responses):
    monkeypatch.setattr(tasks, "generate", lambda *a, **k: [[text] for text in responses])


def test_exact_answer_counts_and_keeps_records(lm, monkeypatch):
    _say(monkeypatch, ["3 + 4 = 7. The answer is: 7", "The answer is: 8", "So it is 9"])
    result = evaluate(*lm, PROBLEMS, "exact_answer", progress=False)
    assert [record["correct"] for record in result["records"]] == [True, True, False]
    assert result["accuracy"] == pytest.approx(2 / 3)
    assert result["low"] < result["accuracy"] < result["high"] and result["n"] == 3
    lenient = evaluate(*lm, PROBLEMS, "exact_answer", last_number=True, progress=False)
    assert lenient["accuracy"] == 1.0


def test_exact_answer_really_generates_and_honours_the_limit(lm):
    result = evaluate(*lm, PROBLEMS, "exact_answer", limit=2, max_new_tokens=4, progress=False)
    assert [record["id"] for record in result["records"]] == ["a", "b"]
    assert result["mode"] == "generate" and result["seconds"] > 0


def test_multiple_choice_takes_the_likeliest_text(lm):
    model, tokenizer = lm
    result = evaluate(model, tokenizer, QA, "multiple_choice", batch_size=8, progress=False)
    for row, record in zip(QA, result["records"], strict=True):
        lines = f"{row['question']}\nA. apples\nB. Tom\nC. pages and more\n"
        prompt = [{"role": "user", "content": lines + 'End with "The answer is: ..."'}]
        ids = encode_prompt(tokenizer, prompt) + tokenizer("The answer is:")["input_ids"]
        sums, means = [], []
        for choice in row["choices"]:
            answer = tokenizer(" " + choice)["input_ids"]
            with torch.no_grad():
                logps = model(torch.tensor([ids + answer])).logits[0].log_softmax(-1)
            picked = logps[len(ids) - 1 : -1].gather(1, torch.tensor(answer)[:, None])
            sums.append(picked.sum().item())
            means.append(picked.mean().item())
        assert record["logps"] == pytest.approx(sums, abs=1e-4)
        assert record["correct"] == (means.index(max(means)) == row["answer_index"])
        assert record["correct_raw"] == (sums.index(max(sums)) == row["answer_index"])
    right = sum(record["correct_raw"] for record in result["records"])
    assert result["accuracy_raw"] == right / 6


def test_multiple_choice_by_generation(lm, monkeypatch):
    _say(monkeypatch, ["The answer is: apples", "The answer is: B", "The answer is: Tom"])
    result = evaluate(*lm, QA[:3], "multiple_choice", mode="generate", progress=False)
    assert [record["correct"] for record in result["records"]] == [True, True, False]


def test_preference_compares_sums_and_means(lm):
    result = evaluate(*lm, PAIRS, "preference", progress=False)
    first = result["records"][0]
    assert first["correct"] == (first["chosen_logps"] > first["rejected_logps"])
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in PAIRS]
    other = evaluate(*lm, swapped, "preference", progress=False)
    assert other["accuracy"] == 1 - result["accuracy"]
    assert other["accuracy_per_token"] == 1 - result["accuracy_per_token"]


@pytest.mark.parametrize(
    ("rows", "task", "message"),
    [
        ([], "preference", "no rows"),
        ([{"question": "?"}], "exact_answer", "row 1 lacks final_answer"),
        ([{**QA[0], "answer_index": 3}], "multiple_choice", "answer_index 3"),
        (PROBLEMS, "poetry", "poetry"),
        ([{**PAIRS[1], "chosen": [{"role": "user", "content": "x"}]}], "preference", "assistant"),
    ],
)
def test_bad_rows_are_named(lm, rows, task, message):
    with pytest.raises(DataError, match=message):
        evaluate(*lm, rows, task, progress=False)
