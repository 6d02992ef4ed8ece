import math

import pytest
import torch

from lit_align.errors import LocalizationError
from lit_align.localizers import LazyScores
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
