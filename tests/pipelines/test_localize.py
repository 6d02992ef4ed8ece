import pytest
import torch

from lit_align.errors import LocalizationError
from lit_align.language_model import load_language_model, save_language_model
from lit_align.localizers import HeadDistance
from lit_align.localizers.layer_gate import LayerScores
from lit_align.masks import ParameterMask
from lit_align.masks.linear_layers import linear_layers
from lit_align.pipelines.localize import localize


def test_layers_by_their_scores(tiny_llama_dir, tmp_path):
    model, _ = load_language_model(tiny_llama_dir)
    names = list(linear_layers(model))
    scores = LayerScores({name: float(i) for i, name in enumerate(names)}, model.base_fingerprint)
    scores.write(tmp_path / "scores.json")
    given = {"scores": str(tmp_path / "scores.json"), "method": "layer_gate", "ratio": 0.2}
    localize(str(tiny_llama_dir), str(tmp_path / "top.safetensors"), **given)
    localize(str(tiny_llama_dir), str(tmp_path / "low.safetensors"), lowest=True, **given)
    top, low = (ParameterMask.load(tmp_path / f"{n}.safetensors") for n in ("top", "low"))
    assert [n for n, s in top.selections.items() if s.kind == "all"] == sorted(
        names[-3:], key=list(top.selections).index
    )
    assert {n for n, s in low.selections.items() if s.kind == "all"} == set(names[:3])


def test_heads_by_their_distance(tiny_llama_dir, tmp_path):
    model, tokenizer = load_language_model(tiny_llama_dir)
    with torch.no_grad():  # query head 3 of block 1: rows 24 to 31 of 32
        model.model.layers[1].self_attn.q_proj.weight[24:32] += 0.5
    save_language_model(model, tokenizer, tmp_path / "task")
    output = tmp_path / "mask.safetensors"
    localize(
        str(tiny_llama_dir),
        str(output),
        "head_distance",
        str(tmp_path / "task"),
        ratio=0.1,
        heads=HeadDistance(others="freeze"),
    )
    mask = ParameterMask.load(output)
    assert mask.metadata.granularity == "head"
    assert mask.metadata.extra["heads"]["1"] == [3]
    rows = mask.dense("model.layers.1.self_attn.q_proj.weight").all(1)
    assert rows.nonzero().flatten().tolist() == list(range(24, 32))
    assert mask.selections["model.norm.weight"].kind == "none"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "head_distance"}, "head_distance needs --trained"),
        ({"method": "layer_gate"}, "layer_gate needs --scores"),
        ({"method": "random", "scores": "x.json"}, "random takes no --scores"),
        ({"method": "random", "heads": HeadDistance(tau=2.0)}, "random takes no --heads"),
        ({"method": "magnitude", "lowest": True}, "magnitude takes no --lowest"),
        ({"method": "layer_gate", "scores": "x.json", "granularity": "row"}, "ranks all layers"),
    ],
)
def test_settings_of_another_method_are_refused(given, said, tiny_llama_dir, tmp_path):
    with pytest.raises(LocalizationError, match=said):
        localize(str(tiny_llama_dir), str(tmp_path / "mask.safetensors"), **given)
    assert not (tmp_path / "mask.safetensors").exists()
