import pytest
import torch
from torch import nn

from lit_align.errors import LocalizationError
from lit_align.localizers import gradient_scores
from lit_align.masks import select


def test_is_the_absolute_value_of_the_sum_not_the_sum_of_absolute_values():
    model = nn.Linear(2, 1, bias=False)
    for x in ([1.0, 3.0], [-1.0, 1.0]):  # gradients of the output: (1, 3) and (-1, 1)
        model(torch.tensor(x)).sum().backward()
    assert gradient_scores(model)["weight"].tolist() == [[0.0, 4.0]]
    assert select(gradient_scores(model), 0.5).dense("weight").tolist() == [[False, True]]


def test_a_mapping_of_gradients_and_half_precision():
    scores = gradient_scores({"a": torch.tensor([-0.5, 0.25], dtype=torch.bfloat16)})
    assert scores["a"].dtype == torch.float32 and scores["a"].tolist() == [0.5, 0.25]


def test_a_parameter_without_gradient_scores_zero():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model[0](torch.ones(2)).sum().backward()
    scores = gradient_scores(model)
    assert scores["1.weight"].shape == (2, 2) and not scores["1.weight"].any()


def test_no_gradient_at_all_and_a_bad_gradient_are_errors():
    model = nn.Linear(2, 2)
    with pytest.raises(LocalizationError, match="backward"):
        gradient_scores(model)
    model(torch.tensor([1.0, torch.nan])).sum().backward()
    with pytest.raises(LocalizationError, match="'weight'"):
        select(gradient_scores(model), 0.5)
