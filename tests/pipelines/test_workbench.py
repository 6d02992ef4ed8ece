"""`lit-align mask` word by word: what is printed, written and refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CodeGenConfig, CodeGenForCausalLM

from lit_align.errors import LitAlignError, LocalizationError, MaskError, ModelError
from lit_align.language_model import fingerprint
from lit_align.localizers.layer_gate import LayerScores, layer_gate_mask
from lit_align.masks import HeadLayout, ParameterMask, Selection, select
from lit_align.masks.linear_layers import linear_layers
from lit_align.pipelines import workbench
from lit_align.pipelines.workbench.command import mask_command
from lit_align.pipelines.workbench.conversion import convert
from tests.masks.test_membership import random_scores
from tests.report.test_html import Page
from tests.tiny_models import save_tiny_model, tiny_model


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A model, and masks of it of every granularity: e0, e1, h0, h1, l0, l1."""
    folder = tmp_path_factory.mktemp("bench")
    save_tiny_model(folder / "model")
    model, base = tiny_model("llama"), fingerprint(folder / "model")
    layout = HeadLayout.from_model(model)
    for seed in (0, 1):
        scores = random_scores(model, seed)
        select(scores, 0.1, base_fingerprint=base).save(folder / f"e{seed}.safetensors")
        heads = select(scores, 0.3, granularity="head", heads=layout, base_fingerprint=base)
        heads.save(folder / f"h{seed}.safetensors")
        of_layers = {n: float(scores[n].flatten()[0]) for n in linear_layers(model)}
        LayerScores(of_layers, base).write(folder / f"s{seed}.json")
        layer_gate_mask(of_layers, model, 0.5, base_fingerprint=base).save(
            folder / f"l{seed}.safetensors"
        )
    return folder


@pytest.fixture(autouse=True)
def _there(bench, monkeypatch):
    monkeypatch.chdir(bench)


def run(words):
    mask_command(words.split())


def load(name):
    return ParameterMask.load(f"{name}.safetensors")


def test_show_prints_facts_blocks_modules_heads_and_parameters(capsys):
    run("show h0.safetensors --model model --parameters")
    said = capsys.readouterr().out
    mask = load("h0")
    for text in (mask.digest, mask.metadata.base_fingerprint, "By block", "By module"):
        assert text in said
    assert "By attention head" in said and "By parameter" in said and "1,792" in said
    assert len(workbench.show("h0.safetensors")) == 3


def test_compare_takes_the_common_granularity_and_any_number_of_files(capsys):
    run("compare e0.safetensors e1.safetensors h0.safetensors --output three.json")
    said = capsys.readouterr().out
    assert "by element" in said and "(0.053)" in said
    written = json.loads(Path("three.json").read_text())
    assert written["level"] == "element" and len(written["jaccard"]) == 3
    assert written["jaccard"][0][1] == pytest.approx(load("e0").jaccard(load("e1")))
    assert workbench.compare(["l0.safetensors", "l1.safetensors"]).level == "layer"
    found = workbench.compare(["h0.safetensors", "h1.safetensors"], model="model")
    assert (found.level, found.units, found.counts) == ("head", 8, (3, 3))
    rows = workbench.compare(["h0.safetensors", "l1.safetensors"], "row", 1.0)
    assert rows.level == "row" and rows.units == 1024 and rows.share == 1.0


def test_layers_compare_alike_with_the_model_and_without():
    files = ["l0.safetensors", "h1.safetensors"]
    assert workbench.compare(files, "layer") == workbench.compare(files, "layer", model="model")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("and e0 e1 h0", lambda a, b, c: a & b & c),
        ("or e0 e1 h0", lambda a, b, c: a | b | c),
        ("minus e0 e1 h0", lambda a, b, c: (a - b) - c),
        ("invert e0", lambda a, b, c: ~a),
    ],
)
def test_combine_is_set_algebra(words, expected, capsys):
    operation, *names = words.split()
    files = " ".join(f"{name}.safetensors" for name in names)
    run(f"combine {operation} {files} --output new/result.safetensors")
    result = ParameterMask.load("new/result.safetensors")
    assert result == expected(load("e0"), load("e1"), load("h0"))
    extra = result.metadata.extra
    assert extra["operation"] == operation
    assert extra["masks"][0] == {"file": "e0.safetensors", "digest": load("e0").digest}
    assert "result.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["", " --model model"])
def test_inverting_layers_leaves_norms_alone_where_asked(model):
    run(f"combine invert l0.safetensors --output inverted.safetensors --linear{model}")
    inverted, layers = load("inverted"), set(linear_layers(tiny_model("llama")))
    for name, selection in inverted.selections.items():
        whole = load("l0").selections[name].kind == "all"
        assert selection.kind == ("all" if name in layers and not whole else "none")


def test_plot_writes_every_picture_into_one_page(capsys):
    pytest.importorskip("matplotlib")
    run("plot e0.safetensors h0.safetensors s0.json --model model --output pictures/p.html")
    page = Page(Path("pictures/p.html").read_text(encoding="utf-8"))
    said = " ".join(page.words)
    assert len(page.addresses) == 1 + 3 + 3 + 1
    assert all(a.startswith("data:image/svg+xml") for a in page.addresses)
    for text in (load("e0").digest, load("h0").metadata.base_fingerprint, "weight", "torch"):
        assert text in said
    assert capsys.readouterr().out.strip() == "pictures/p.html"


@pytest.mark.parametrize(
    ("words", "start"),
    [
        ("l0.safetensors --kind layers --output a.png", b"\x89PNG"),
        ("h0.safetensors --kind heads --model model --output a.svg", b"<?xml"),
        ("e0.safetensors --kind density --output a.SVG", b"<?xml"),
        ("e0.safetensors e1.safetensors --kind jaccard --output a.svg", b"<?xml"),
        ("s0.json --kind layers --ratio 0.75 --output a.svg", b"<?xml"),
    ],
)
def test_plot_writes_one_picture(words, start):
    pytest.importorskip("matplotlib")
    run(f"plot {words}")
    assert Path(words.split()[-1]).read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("files", "model", "level"),
    [
        (["h0", "h1"], "model", "head"),
        (["h0", "h1"], None, "element"),  # where the heads lie is not known
        (["l0", "l1"], None, "layer"),
        (["e0", "h1"], "model", "element"),
    ],
)
def test_plot_compares_by_the_units_of_the_masks(files, model, level):
    pytest.importorskip("matplotlib")
    names = [f"{name}.safetensors" for name in files]
    (figure,) = workbench.plot(names, "j.svg", "jaccard", model=model)
    assert figure.title == f"Jaccard index, by {level}"
    assert figure.values == workbench.compare(names, level, model="model").jaccard


def test_convert_to_the_public_code_and_back():
    run("convert e0.safetensors --output public/mask.bin")
    run("convert public/mask.bin --output back.safetensors --model model")
    assert load("back") == load("e0")
    assert load("back").metadata.base_fingerprint == fingerprint("model")


def test_convert_to_peft_and_back():
    run("convert l0.safetensors --output ila.json --model model")
    assert "base_fingerprint" in json.loads(Path("ila.json").read_text())
    run("convert ila.json --output back.safetensors --model model")
    assert load("back") == load("l0")


def test_a_config_alone_is_a_model(tmp_path):
    (tmp_path / "config.json").write_bytes(Path("model/config.json").read_bytes())
    Path("own.json").write_text('{"target_modules": ["q_proj"]}')
    convert("own.json", "x.safetensors", str(tmp_path))
    assert load("x").metadata.base_fingerprint is None
    assert len(workbench.show("h0.safetensors", str(tmp_path))) == 4


def save_mask_of_another_model(path):
    ParameterMask({"w": Selection.all((2, 2))}).save(path)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ("show nowhere.safetensors", MaskError, "nowhere.safetensors"),
        ("show stranger.safetensors --model model", MaskError, "stranger.*no mask of model"),
        ("show model/model.safetensors", MaskError, "model.safetensors: not a mask"),
        ("show weights.safetensors", MaskError, "weights.safetensors: not a mask"),
        ("compare e0.safetensors", MaskError, "two masks or more, not 1"),
        ("compare e0.safetensors e0.safetensors", MaskError, "named twice"),
        ("compare e0.safetensors stranger.safetensors", MaskError, "e0.safetensors and stranger"),
        ("compare e0.safetensors rebased.safetensors", MaskError, "e0.* and rebased.*different"),
        ("compare h0.safetensors h1.safetensors", ModelError, "by heads needs the model"),
        ("compare e0.safetensors e1.safetensors --share 0", MaskError, "share of a unit"),
        ("compare e0.safetensors e1.safetensors --output a.txt", MaskError, "a.txt: a picture"),
        ("compare e0.safetensors e1.safetensors --model .", ModelError, "no config"),
        ("combine and e0.safetensors --output a.safetensors", MaskError, "two masks or more"),
        ("combine invert e0.safetensors e1.safetensors --output a", MaskError, "one mask, not 2"),
        ("combine or e0.safetensors rebased.safetensors --output a", MaskError, "different base"),
        ("plot e0.safetensors --output a.png", MaskError, "one picture, not 2"),
        ("plot e0.safetensors --kind jaccard --output a.png", MaskError, "nothing to draw"),
        ("plot e0.safetensors --kind scores --output a.png", MaskError, "nothing to draw"),
        ("plot e0.safetensors --kind heads --output a.png", ModelError, "needs the model"),
        ("plot e0.safetensors --ratio 0.5 --output a.html", MaskError, "ratio is of layer scores"),
        ("plot three.json --output a.html", LocalizationError, "three.json: not a file"),
        ("convert e0.safetensors --output a.safetensors", MaskError, "same format"),
        ("convert e0.safetensors --output a.txt", MaskError, "a.txt: ends neither"),
        ("convert e0.safetensors --output a.json", ModelError, "needs the model"),
        (
            "convert e0.safetensors --output a.json --model model",
            MaskError,
            r"e0\..*granularity layer",
        ),
        (
            "convert strange.json --output a.safetensors --model model",
            MaskError,
            r"strange\..*'no'",
        ),
        ("convert weights.safetensors --output a.bin", MaskError, "not a mask"),
        ("convert weights.bin --output a.safetensors", ModelError, "needs the model"),
    ],
)
def test_bad_input_says_what_and_which_file(words, error, message):
    save_mask_of_another_model("stranger.safetensors")
    rebased = load("e0")
    metadata = type(rebased.metadata)(base_fingerprint="0" * 64)
    ParameterMask(rebased.selections, metadata).save("rebased.safetensors")
    save_file({"w": torch.ones(2)}, "weights.safetensors")
    Path("three.json").write_text("{}")
    Path("strange.json").write_text('{"target_modules": ["no"]}')
    with pytest.raises(LitAlignError, match=message) as caught:
        run(words)
    assert type(caught.value) is error


def test_masks_of_two_bases_compare_where_asked(capsys):
    rebased = load("e0")
    metadata = type(rebased.metadata)(base_fingerprint="0" * 64)
    ParameterMask(rebased.selections, metadata).save("rebased.safetensors")
    run("compare e0.safetensors rebased.safetensors --across-bases")
    assert "1.000" in capsys.readouterr().out


def test_a_model_without_separable_heads_says_so(tmp_path):
    config = CodeGenConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)
    config.save_pretrained(tmp_path)
    full = ParameterMask.full(CodeGenForCausalLM(config))
    full.save("full.safetensors")
    (~full).save("empty.safetensors")
    files = ["full.safetensors", "empty.safetensors"]
    assert workbench.compare(files, "layer", model=str(tmp_path)).jaccard[0][1] == 0.0
    assert len(workbench.show(files[0], str(tmp_path))) == 3
    for act in (
        lambda: workbench.compare(files, "head", model=str(tmp_path)),
        lambda: workbench.plot(files, "a.html", "heads", model=str(tmp_path)),
    ):
        with pytest.raises(MaskError, match=r"codegen.*qkv_proj.*cannot be told apart"):
            act()


def test_an_unknown_verb_or_option_ends_with_the_usage(capsys):
    for words in ("frobnicate", "show", "compare e0.safetensors --levels row", ""):
        with pytest.raises(SystemExit) as caught:
            run(words)
        assert caught.value.code == 2
    assert "usage: lit-align mask" in capsys.readouterr().err
