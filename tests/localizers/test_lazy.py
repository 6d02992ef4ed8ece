import math

import pytest
import torch

from lit_align.errors import LocalizationError
from lit_align.localizers import ElementwiseScores, LazyScores
from lit_align.masks import select


def test_computes_at_every_read_and_only_then():
    reads = []
    scores = LazyScores(["b", "a"], lambda name: reads.append(name) or torch.ones(2))
    assert list(scores) == ["b", "a"] and len(scores) == 2 and "a" in scores and "c" not in scores
    assert reads == []
    assert scores["a"].tolist() == scores["a"].tolist() == [1.0, 1.0]
    assert reads == ["a", "a"]
    with pytest.raises(KeyError):
        scores["c"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_finite_name_the_parameter(value):
    scores = LazyScores(["a", "b"], lambda n: torch.tensor([0.0, value if n == "b" else 1.0]))
    with pytest.raises(LocalizationError, match="'b'"):
        select(scores, 0.5)


def test_a_parameter_without_entries_has_no_scores():
    assert LazyScores(["a"], lambda _: torch.zeros(0, 3))["a"].shape == (0, 3)


def test_parts_are_the_whole(monkeypatch):
    values = {"a": torch.rand(3, 7), "b": torch.rand(5)}
    asked = []

    def compute(name, start, stop):
        asked.append((name, start, stop))
        return values[name].reshape(-1)[start:stop]

    scores = ElementwiseScores({name: tuple(t.shape) for name, t in values.items()}, compute)
    assert list(scores) == ["a", "b"] and "a" in scores and scores.shape("a") == (3, 7)
    assert torch.equal(scores["a"], values["a"]) and asked == [("a", 0, 21)]
    assert torch.equal(scores.part("a", 4, 9), values["a"].reshape(-1)[4:9])
    monkeypatch.setattr("lit_align.masks.parts.PART", 8)
    asked.clear()
    assert select(scores, 0.5) == select(values, 0.5)
    assert asked == [("a", 0, 8), ("a", 8, 16), ("a", 16, 21), ("b", 0, 5)] * 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_parts_that_are_not_finite_name_the_parameter(value):
    scores = ElementwiseScores({"a": (4,)}, lambda *_: torch.tensor([0.0, value]))
    with pytest.raises(LocalizationError, match="'a'"):
        scores.part("a", 0, 2)
