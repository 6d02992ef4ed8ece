"""Head sets and what they train, against sets written by hand."""

import pytest
import torch

from lit_align.errors import LocalizationError, MaskError
from lit_align.masks import HeadLayout, Selection
from lit_align.masks.head_sets import (
    OtherWeights,
    attention_shares,
    count_of_heads,
    head_set_mask,
    layer_consistent_heads,
    random_heads,
    top_heads,
)
from tests.attention_models import LAYOUTS, attention_model

HEADS = {"0": [1, 0], "1": [3]}  # with 2 groups: group 0 of block 0, group 1 of block 1


def chosen_rows(mask) -> dict[str, list[int]]:
    return {n: s.rows.tolist() for n, s in mask.selections.items() if s.kind == "rows"}


def whole(mask, kind: str) -> set[str]:
    return {name for name, s in mask.selections.items() if s.kind == kind}


def test_a_groups_keys_and_values_are_selected_once():
    model = attention_model("gqa")  # head_dim 8
    layout = HeadLayout.from_model(model)
    mask = head_set_mask(layout, HEADS, model, OtherWeights("freeze"))
    at = "model.layers.{}.self_attn.{}_proj.weight"
    assert chosen_rows(mask) == {
        at.format(0, "q"): list(range(16)),
        at.format(0, "k"): list(range(8)),
        at.format(0, "v"): list(range(8)),
        at.format(1, "q"): list(range(24, 32)),
        at.format(1, "k"): list(range(8, 16)),
        at.format(1, "v"): list(range(8, 16)),
    }
    assert mask.metadata.granularity == "head"
    assert mask.metadata.extra["heads"] == {"0": [0, 1], "1": [3]}
    # 3 of 8 query heads, and 2 of 4 groups: their shares of (32 + 16 + 16) rows a block.
    assert attention_shares(layout, mask) == {
        "q": 3 / 8, "k": 0.5, "v": 0.5, "qkv": pytest.approx((24 + 16 + 16) / 128),
    }  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_heads_of_a_mask_are_found_again(name):
    model = attention_model(name)
    layout = HeadLayout.from_model(model)
    for other_weights in (OtherWeights("train"), OtherWeights("freeze")):
        mask = head_set_mask(layout, HEADS, model, other_weights)
        assert layout.chosen_heads(mask.selections) == {"0": [0, 1], "1": [3]}
        assert attention_shares(layout, mask)["q"] == 3 / 8
    every = {"0": range(4), "1": range(4)}
    shares = attention_shares(layout, head_set_mask(layout, every, model))
    assert shares == {"q": 1.0, "k": 1.0, "v": 1.0, "qkv": 1.0}


def test_the_other_weights_train_or_are_frozen():
    model = attention_model("biased")
    layout = HeadLayout.from_model(model)
    attention = "model.layers.{}.self_attn.{}"
    weights = {attention.format(i, f"{x}_proj.weight") for i in (0, 1) for x in "qkv"}
    biases = {attention.format(i, f"{x}_proj.bias") for i in (0, 1) for x in "qkv"}
    outputs = {attention.format(i, "o_proj.weight") for i in (0, 1)}
    rest = {name for name, _ in model.named_parameters()} - weights - biases - outputs
    cases = {
        ("train", None): rest | outputs,
        ("train", "freeze"): rest,
        ("freeze", None): set(),
        ("freeze", "train"): outputs,
    }
    for (others, o_proj), expected in cases.items():
        mask = head_set_mask(layout, HEADS, model, OtherWeights(others, o_proj))
        assert whole(mask, "all") == expected
        assert whole(mask, "none") >= biases  # they would move frozen heads
        assert mask.metadata.extra["o_proj"] == (o_proj or others)
    none = head_set_mask(layout, {}, model)  # "w/o attn": q, k and v alone are frozen
    assert whole(none, "none") == weights | biases


def test_top_heads_rank_all_blocks_together():
    scores = {"0": torch.tensor([0.1, 0.4, 0.2, 0.0]), "1": torch.tensor([0.3, 0.2, 0.2, 0.5])}
    scores = {block: each.double() for block, each in scores.items()}
    heads, cut = top_heads(scores, 0.3)  # 2.4 heads: 3
    assert heads == {"0": [1], "1": [0, 3]} and cut["threshold"] == pytest.approx(0.3)
    assert top_heads(scores, 0.3, "floor")[0] == {"0": [1], "1": [3]}
    heads, cut = top_heads(scores, 0.5)  # three heads tie for one place: the first is taken
    assert heads == {"0": [1, 2], "1": [0, 3]} and cut["ties_at_threshold"] == 3 / 4


def test_the_number_of_heads():
    assert [count_of_heads(0.1, n) for n in (270, 8, 1)] == [27, 1, 1]
    assert [count_of_heads(0.1, n, "floor") for n in (270, 19)] == [27, 1]
    assert count_of_heads(0.07, 100) == 7  # 0.07 · 100 is 7.000000000000001 in binary
    with pytest.raises(LocalizationError, match="rounded down, is none"):
        count_of_heads(0.1, 8, "floor")
    for ratio in (0, 1.5, True, float("nan")):
        with pytest.raises(MaskError, match="ratio"):
            count_of_heads(ratio, 8)


def test_random_sets_have_the_asked_size_and_depend_on_the_seed():
    layout = HeadLayout.from_model(attention_model("gqa"))
    sets = [random_heads(layout, 3, seed) for seed in range(40)]
    assert all(sum(map(len, heads.values())) == 3 for heads in sets)
    assert sets[0] == random_heads(layout, 3, 0)
    counts = torch.zeros(8)
    for heads in sets:
        counts[[4 * int(b) + h for b, some in heads.items() for h in some]] += 1
    assert counts.min() > 5 and counts.max() < 28  # 15 expected


@pytest.mark.parametrize(("count", "each"), [(2, [1, 1]), (4, [2, 2]), (3, [1, 2]), (1, [0, 1])])
def test_layer_consistent_sets_spread_over_the_blocks(count, each):
    layout = HeadLayout.from_model(attention_model("gqa"))
    for seed in range(10):
        heads = layer_consistent_heads(layout, count, seed)
        assert sorted(map(len, heads.values())) == each
        assert all(0 <= h < 4 for some in heads.values() for h in some)
    draws = {str(layer_consistent_heads(layout, count, seed)) for seed in range(10)}
    assert len(draws) > 3


def test_heads_that_are_not_there_are_refused():
    model = attention_model("gqa")
    layout = HeadLayout.from_model(model)
    with pytest.raises(MaskError, match="block 1 has heads 0 to 3, not 2 to 4"):
        head_set_mask(layout, {"1": [2, 4]}, model)
    with pytest.raises(MaskError, match="no block '2'"):
        head_set_mask(layout, {"2": [0]}, model)


def test_a_head_that_is_selected_in_part_is_not_chosen():
    model = attention_model("gqa")
    layout = HeadLayout.from_model(model)
    mask = head_set_mask(layout, {"0": [1]}, model)
    name = "model.layers.0.self_attn.q_proj.weight"
    rows = Selection.of_rows((32, 32), torch.arange(8, 31))  # head 3 but for its last row
    found = layout.chosen_heads(mask.selections | {name: rows})
    assert found == {"0": [1, 2], "1": []}


def test_a_mask_of_another_model_has_no_heads_of_this_one():
    model, other = attention_model("gqa"), attention_model("gpt2")
    layout = HeadLayout.from_model(model)
    mask = head_set_mask(HeadLayout.from_model(other), HEADS, other)
    with pytest.raises(MaskError, match=r"q_proj\.weight"):
        layout.chosen_heads(mask.selections)
