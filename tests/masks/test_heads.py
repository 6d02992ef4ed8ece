import pytest
import torch
from torch import nn

from lit_align.errors import MaskError
from lit_align.masks import HeadLayout, select
from tests.tiny_models import tiny_model


def flat_scores(model):
    """Zero scores for every parameter."""
    return {name: torch.zeros(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_grouped_head_selects_its_q_rows_and_its_groups_k_and_v_rows(kind):
    model = tiny_model(kind)  # 2 blocks of 4 query heads in 2 groups, head_dim 8
    scores = flat_scores(model)
    prefix = "model.layers.1.self_attn."
    scores[prefix + "q_proj.weight"][16:24] = 1.0  # query head 2, group 1
    mask = select(scores, 0.1, granularity="head", heads=HeadLayout.from_model(model))
    assert mask.selections[prefix + "q_proj.weight"].rows.tolist() == list(range(16, 24))
    for letter in "kv":
        assert mask.selections[prefix + f"{letter}_proj.weight"].rows.tolist() == list(range(8, 16))
    assert mask.count() == 3 * 8 * 32
    assert set(mask.selections) == set(scores) and mask.metadata.granularity == "head"


def test_key_value_scores_count_for_every_head_of_their_group():
    model = tiny_model("llama")
    scores = flat_scores(model)
    scores["model.layers.0.self_attn.k_proj.weight"][:8] = 1.0
    mask = select(scores, 0.25, granularity="head", heads=HeadLayout.from_model(model))
    assert mask.selections["model.layers.0.self_attn.q_proj.weight"].rows.tolist() == list(
        range(16)
    )
    assert mask.metadata.extra["threshold"] == pytest.approx(1 / 3)


def test_fused_conv1d_heads_are_columns():
    model = tiny_model("gpt2")  # 2 blocks of 4 heads, head_dim 8, q|k|v in 96 columns
    scores = flat_scores(model)
    name = "transformer.h.0.attn.c_attn.weight"
    scores[name][:, 32 + 8 : 32 + 16] = 1.0  # k of head 1
    mask = select(scores, 0.1, granularity="head", heads=HeadLayout.from_model(model))
    expected = [start + i for start in (8, 40, 72) for i in range(8)]
    assert mask.selections[name].rows.tolist() == expected and mask.selections[name].axis == 1
    assert mask.count() == 24 * 32


def test_all_heads_are_all_of_q_k_and_v():
    model = tiny_model("gpt2")
    mask = select(flat_scores(model), 1.0, granularity="head", heads=HeadLayout.from_model(model))
    kinds = {name: s.kind for name, s in mask.selections.items() if s.kind != "none"}
    assert kinds == {f"transformer.h.{i}.attn.c_attn.weight": "all" for i in (0, 1)}


def test_per_parameter_takes_the_same_number_of_heads_in_every_block():
    model = tiny_model("llama")
    scores = {name: torch.rand(p.shape) for name, p in model.named_parameters()}
    layout = HeadLayout.from_model(model)
    mask = select(scores, 0.5, "per_parameter", granularity="head", heads=layout)
    for block in (0, 1):
        q = mask.selections[f"model.layers.{block}.self_attn.q_proj.weight"]
        assert q.rows.numel() == 2 * 8


def test_what_cannot_be_done_is_refused():
    model = tiny_model("llama")
    with pytest.raises(MaskError, match="layout"):
        select(flat_scores(model), 0.1, granularity="head")
    scores = flat_scores(model)
    del scores["model.layers.0.self_attn.v_proj.weight"]
    with pytest.raises(MaskError, match=r"layers\.0\.self_attn\.v_proj"):
        select(scores, 0.1, granularity="head", heads=HeadLayout.from_model(model))
    model.config.num_key_value_heads = 4
    with pytest.raises(MaskError, match="its config says"):
        HeadLayout.from_model(model)


def test_a_model_without_known_attention_is_refused():
    model = nn.Linear(4, 4)
    model.config = tiny_model("llama").config
    with pytest.raises(MaskError, match="llama has neither"):
        HeadLayout.from_model(model)
