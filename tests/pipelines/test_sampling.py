"""Responses of the model become pairs of a right and a wrong one."""

import pytest

from lit_align.errors import DataError
from lit_align.language_model import load_language_model
from lit_align.pipelines import sampling
from lit_align.pipelines.settings import SampleSettings

ASKED = [{"role": "user", "content": "How many?"}]
ROW = {"id": "q", "prompt": ASKED, "target": "The answer is: 4", "final_answer": "4"}


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def drawn(monkeypatch, *responses: str, **settings) -> dict:
    """The row with these responses, as if a model had given them."""
    monkeypatch.setattr(sampling, "generate", lambda *a, **k: [list(responses)])
    (row,) = sampling.sample(None, None, [ROW], SampleSettings(**settings))
    return row


def test_responses_are_judged_and_counted_once(monkeypatch):
    row = drawn(monkeypatch, "The answer is: 4", " The answer is: 4 ", "", "It is 5", "It is 5")
    assert row["right"] == ["The answer is: 4"] and row["wrong"] == ["It is 5"]


def test_pairs_are_right_times_wrong_up_to_the_limit():
    row = ROW | {"right": ["a", "b"], "wrong": ["x", "y", "z"]}
    pairs, wrong = sampling.make_pairs([row], SampleSettings(pairs_per_prompt=5))
    assert len(pairs) == 5 and pairs[0]["chosen"] == said("a") and pairs[0]["rejected"] == said("x")
    assert [w["response"] for w in wrong] == ["x", "y", "z"]
    assert [w["id"] for w in wrong] == ["q/0", "q/1", "q/2"]
    _, few = sampling.make_pairs([row], SampleSettings(wrong_per_prompt=2))
    assert [w["response"] for w in few] == ["x", "y"]


def test_the_gold_response_stands_in_where_none_is_right():
    row = ROW | {"right": [], "wrong": ["x"]}
    pairs, _ = sampling.make_pairs([row], SampleSettings())
    assert [p["chosen"] for p in pairs] == [said("The answer is: 4")]
    with pytest.raises(DataError, match="gold_as_chosen"):
        sampling.make_pairs([row], SampleSettings(gold_as_chosen=False))


def test_given_pairs_are_taken_as_they_are():
    row = {"id": "p", "prompt": "Hi", "target": " yes", "rejected": " no"}
    pairs, wrong = sampling.given_pairs([row])
    assert pairs == [{"id": "p", "prompt": "Hi", "chosen": " yes", "rejected": " no"}]
    assert wrong[0]["response"] == " no" and wrong[0]["target"] == " yes"


def test_draws_depend_on_the_seed_alone(tiny_llama_dir):
    model, tokenizer = load_language_model(tiny_llama_dir)
    rows = [ROW, ROW | {"id": "r", "prompt": [{"role": "user", "content": "And 3 + 4?"}]}]
    settings = [SampleSettings(num_samples=3, max_new_tokens=5, seed=seed) for seed in (0, 0, 1)]
    one, same, other = (sampling.sample(model, tokenizer, rows, s) for s in settings)
    assert one == same != other
    assert all(len(row["wrong"]) <= 3 and not row["right"] for row in one)
