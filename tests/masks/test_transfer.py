"""Rankings carried to another architecture; every expected layer is found by hand."""

import pytest

from lit_align.errors import MaskError
from lit_align.masks.linear_layers import linear_layers
from lit_align.masks.transfer import transfer_scores
from tests.tiny_models import tiny_model


def stack(prefix: str, blocks: int, *modules: str, outside: str = "") -> list[str]:
    inside = [f"{prefix}.{b}.{module}.weight" for b in range(blocks) for module in modules]
    return [*inside, f"{outside}.weight"] if outside else inside


def numbered(names: list[str]) -> dict[str, float]:
    return {name: float(i) for i, name in enumerate(names)}


def blocks_taken(target: int, source: int) -> list[float]:
    """Which block's score each block of the target takes."""
    found = transfer_scores(numbered(stack("a", source, "fc")), stack("b", target, "fc"))
    return list(found.scores.values())


@pytest.mark.parametrize(
    ("target", "source", "expected"),
    [
        (4, 4, [0, 1, 2, 3]),
        (3, 5, [0, 2, 4]),  # places 0, 1/2, 1 of 0, 1/4, 2/4, 3/4, 1
        (5, 3, [0, 0, 1, 1, 2]),  # 1/4 is as near to 0 as to 1/2: the lower one
        (4, 2, [0, 0, 1, 1]),  # 1/3 and 2/3 between 0 and 1
        (2, 1, [0, 0]),
        (1, 3, [0]),
    ],
)
def test_a_block_takes_the_nearest_relative_position(target, source, expected):
    assert blocks_taken(target, source) == expected


def test_layers_without_a_score_keep_their_place_and_give_none():
    """Of four blocks the last two are scored: they are places 2/3 and 1, not 0 and 1."""
    source = stack("a", 4, "fc", "up", outside="head")
    scores = {name: float(name[2]) for name in source if name[2] in "23"}
    unscored = [name for name in source if name not in scores]
    found = transfer_scores(scores, stack("b", 4, "fc", outside="head"), unscored)
    assert found.scores == {"b.2.fc.weight": 2.0, "b.3.fc.weight": 3.0}
    assert found.unmatched == ("b.0.fc.weight", "b.1.fc.weight", "head.weight")
    assert found.unused == ("up",)


def test_modules_are_matched_by_name_inside_the_block():
    source = numbered(stack("model.layers", 2, "attn.q", "attn.k", outside="lm_head"))
    found = transfer_scores(source, stack("transformer.h", 3, "attn.k", outside="lm_head"))
    assert found.scores == {
        "transformer.h.0.attn.k.weight": 1.0,
        "transformer.h.1.attn.k.weight": 1.0,
        "transformer.h.2.attn.k.weight": 3.0,
        "lm_head.weight": 4.0,
    }
    assert found.sources["transformer.h.2.attn.k.weight"] == "model.layers.1.attn.k.weight"
    assert found.unmatched == ()
    assert found.unused == ("attn.q",)


def test_names_without_counterpart_are_reported_and_not_guessed():
    source = numbered(stack("h", 2, "attn.c_attn", "mlp.fc"))
    found = transfer_scores(source, stack("layers", 2, "self_attn.q_proj", "mlp.fc"))
    assert list(found.scores) == ["layers.0.mlp.fc.weight", "layers.1.mlp.fc.weight"]
    assert found.unmatched == (
        "layers.0.self_attn.q_proj.weight",
        "layers.1.self_attn.q_proj.weight",
    )
    assert found.unused == ("attn.c_attn",)


def test_only_blocks_that_have_the_module_count():
    source = {"m.0.mlp.weight": 0.0, "m.1.moe.weight": 1.0, "m.2.mlp.weight": 2.0}
    found = transfer_scores(source, stack("n", 3, "mlp"))
    # places 0, 1/2, 1: the middle one is as far from either end
    assert list(found.scores.values()) == [0.0, 0.0, 2.0]


def test_block_that_the_nearest_one_leaves_out_is_not_called_unused():
    found = transfer_scores(numbered(stack("a", 5, "fc")), stack("b", 2, "fc"))
    assert found.unused == ()


def test_a_tied_head_is_the_counterpart_of_a_head_of_its_own():
    tied, untied = (list(linear_layers(tiny_model(tied=tied))) for tied in (True, False))
    assert tied[-1] != untied[-1]
    scores = numbered(untied)
    found = transfer_scores(scores, tied)
    assert found.sources["model.embed_tokens.weight"] == "lm_head.weight"
    assert found.unmatched == () and len(found.scores) == len(tied)


def test_two_layers_outside_the_blocks_are_matched_by_name_alone():
    source = numbered([*stack("a", 1, "fc"), "project_in.weight", "lm_head.weight"])
    found = transfer_scores(source, [*stack("b", 1, "fc"), "embed.weight"])
    assert found.unmatched == ("embed.weight",)


def test_no_common_module_name_names_both_sides():
    source = numbered(list(linear_layers(tiny_model("gpt2"))))
    with pytest.raises(MaskError, match=r"attn.c_attn.*self_attn.q_proj"):
        transfer_scores(source, linear_layers(tiny_model("llama")))


def test_scores_of_nothing_are_refused():
    with pytest.raises(MaskError, match="the scores are of no block"):
        transfer_scores({}, stack("a", 1, "fc"))
