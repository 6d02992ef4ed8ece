"""Layer scores on disk, and the masks of the layers they rank highest."""

import json

import pytest

from lit_align.errors import LocalizationError, MaskError
from lit_align.localizers.layer_gate import LayerScores, layer_gate_mask, read_scores

SHAPES = {"embed": (9, 2), "q": (2, 2), "k": (2, 1), "norm": (2,), "up": (4, 2), "head": (9, 2)}
SCORES = {"q": 4.2, "k": 3.9, "up": 4.0, "head": 4.1}


def chosen(mask):
    kinds = {selection.kind for selection in mask.selections.values()}
    assert kinds <= {"all", "none"}
    return [name for name, selection in mask.selections.items() if selection.kind == "all"]


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(0.1, ["q"]), (0.25, ["q"]), (0.26, ["q", "head"]), (0.75, ["q", "up", "head"]),
     (1, ["q", "k", "up", "head"])],
)  # fmt: skip
def test_the_share_is_one_of_layers_not_of_entries(ratio, expected):
    mask = layer_gate_mask(SCORES, SHAPES, ratio)
    assert chosen(mask) == expected
    assert mask.metadata.granularity == "layer" and mask.metadata.method == "layer_gate"
    assert mask.metadata.extra["layers_selected"] == len(expected)
    assert mask.metadata.extra["layers_scored"] == 4


def test_the_lowest_are_what_ila_freezes():
    mask = layer_gate_mask(SCORES, SHAPES, 0.5, lowest=True)
    assert chosen(mask) == ["k", "up"]
    assert mask.metadata.extra["threshold"] == pytest.approx(4.0)
    assert chosen(layer_gate_mask(SCORES, SHAPES, 0.5)) == ["q", "head"]


def test_ties_are_taken_in_the_models_order_and_counted():
    scores = LayerScores({"up": 4.0, "q": 4.0, "k": 4.0, "head": 4.5})
    mask = layer_gate_mask(scores, SHAPES, 0.5)
    assert chosen(mask) == ["q", "head"]
    assert mask.metadata.extra["ties_at_threshold"] == 3 / 2
    assert mask.metadata.extra["spread"] == 0.5
    assert scores.ties == 3 and scores.spread == 0.5


def test_scores_that_differ_by_less_than_fp32_can_tell_are_still_told_apart():
    scores = {"q": 4.0, "k": 4.0 + 1e-9, "up": 4.0 - 1e-9, "head": 3.0}
    assert chosen(layer_gate_mask(scores, SHAPES, 0.25)) == ["k"]


def test_round_trip_and_what_the_file_says(tmp_path):
    scores = LayerScores(
        SCORES, "abc", initial_score=2.0, change="runs/x", loss="dpo", steps=7,
        unscored=("embed",), extra={"optimizer": "adamw"},
    )  # fmt: skip
    path = scores.write(tmp_path / "deep" / "scores.json")
    assert read_scores(path) == scores
    document = json.loads(path.read_text())
    assert document["gates"]["q"] == pytest.approx(0.98522597)
    assert document["saturated"] is False and document["saturated_share"] == 0.0
    assert document["spread"] == pytest.approx(0.3) and document["ties"] == 0


def test_saturated_gates():
    assert not LayerScores({"q": 4.59, "k": 9.0}).saturated  # σ(4.59) = 0.9899
    assert LayerScores({"q": 4.6, "k": -4.6}).saturated
    assert LayerScores({"q": 4.0, "k": 9.0}).saturated_share == 0.5
    assert LayerScores({"q": -800.0, "k": 800.0}).gates == {"q": 0.0, "k": 1.0}


def test_scores_of_another_model():
    scores = LayerScores(SCORES, base_fingerprint="abc")
    assert layer_gate_mask(scores, SHAPES, 0.5).metadata.base_fingerprint == "abc"
    with pytest.raises(MaskError, match=r"fingerprint abc, this model's is xyz"):
        layer_gate_mask(scores, SHAPES, 0.5, base_fingerprint="xyz")
    with pytest.raises(MaskError, match=r"rank 'head', which the model does not have"):
        layer_gate_mask(scores, {n: s for n, s in SHAPES.items() if n != "head"}, 0.5)


@pytest.mark.parametrize("ratio", [0, 1.1, -0.5, True, "half"])
def test_impossible_ratios(ratio):
    with pytest.raises(MaskError, match="ratio"):
        layer_gate_mask(SCORES, SHAPES, ratio)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a file of layer scores"),
        ("[]", "not a file of layer scores"),
        ('{"format_version": 1}', "not a file of layer scores"),
        ('{"format_version": 9, "layers": {"q": 1.0}, "unscored": []}', "format version 9"),
        ('{"format_version": 1, "layers": {}, "unscored": []}', "at least one"),
        ('{"format_version": 1, "layers": {"q": "4"}, "unscored": []}', "finite numbers"),
        ('{"format_version": 1, "layers": {"q": NaN}, "unscored": []}', "no finite number"),
        ('{"format_version": 1, "layers": [1.0], "unscored": []}', "finite numbers"),
    ],
)
def test_damaged_files(text, message, tmp_path):
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(LocalizationError, match=message) as error:
        read_scores(path)
    assert str(path) in str(error.value)
    with pytest.raises(LocalizationError, match="not a file of layer scores"):
        read_scores(tmp_path / "missing.json")
