import torch

from lit_align.localizers import magnitude_scores, random_scores
from lit_align.masks import named_shapes, select
from tests.tiny_models import tiny_model


def test_random_scores_depend_on_name_and_seed_alone():
    shapes = {"a": (3, 4), "b": (3, 4)}
    scores = random_scores(shapes, seed=1)
    assert torch.equal(scores["a"], scores["a"])
    assert torch.equal(scores["b"], random_scores({"b": (3, 4)}, seed=1)["b"])
    assert not torch.equal(scores["a"], scores["b"])
    assert not torch.equal(scores["a"], random_scores(shapes, seed=2)["a"])


def test_random_scores_of_a_model_spread_a_mask_evenly():
    model = tiny_model("llama")
    mask = select(random_scores(model, seed=0), 0.1)
    assert set(mask.selections) == set(named_shapes(model))
    large = [row["ratio"] for row in mask.table() if row["total"] >= 1024]
    assert all(abs(ratio - 0.1) < 0.05 for ratio in large)


def test_random_scores_are_the_same_on_every_machine():
    assert [round(x, 6) for x in random_scores({"a": (2,)}, 0)["a"].tolist()] == [0.94444, 0.847524]


def test_magnitude_scores_are_absolute_values_in_fp32():
    a = torch.tensor([-2.0, 1.0], dtype=torch.bfloat16)
    scores = magnitude_scores({"a": a})
    assert scores["a"].dtype == torch.float32 and scores["a"].tolist() == [2.0, 1.0]
    model = tiny_model("gpt2")
    for name, parameter in model.named_parameters():
        assert torch.equal(magnitude_scores(model)[name], parameter.abs())
