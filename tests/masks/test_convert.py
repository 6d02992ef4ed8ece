"""Masks of the public ALLO code and peft's module lists: there and back, and what is refused."""

import json
import os

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from lit_align.errors import MaskError
from lit_align.localizers.layer_gate import layer_gate_mask
from lit_align.masks import ParameterMask, Selection, convert, select
from lit_align.masks.convert import (
    ModelNames,
    mask_of_targets,
    peft_targets,
    read_allo,
    read_targets,
    write_allo,
    write_targets,
)
from lit_align.masks.linear_layers import linear_layers
from tests.masks.test_membership import random_scores
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def names(model):
    return ModelNames.of_model(model)


def layer_mask(model, ratio=0.4, seed=0):
    torch.manual_seed(seed)
    scores = {name: float(torch.randn(())) for name in linear_layers(model)}
    return layer_gate_mask(scores, model, ratio, base_fingerprint="b" * 64)


def public_mask(model):
    """As the public script makes it: bf16, under the names of `state_dict`, tied ones twice."""
    return {
        name: (torch.rand(t.shape) < 0.05).to(torch.bfloat16)
        for name, t in model.state_dict().items()
        if name != "lm_head.weight"
    }


def test_to_the_public_code_and_back(model, names, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "CHUNK", 1000)  # so that tensors are cut
    mask = select(random_scores(model), 0.1)
    write_allo(mask, tmp_path / "new" / "mask.bin")
    dense = torch.load(tmp_path / "new" / "mask.bin", weights_only=True)
    assert set(dense) == {name for name, _ in model.named_parameters()}
    for name, tensor in dense.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor.bool(), mask.dense(name))
    back = read_allo(tmp_path / "new" / "mask.bin", names, base_fingerprint="f" * 64)
    assert back == mask and back.metadata.base_fingerprint == "f" * 64
    assert os.listdir(tmp_path / "new") == ["mask.bin"]


def test_a_mask_of_the_public_script_with_the_tied_head_twice(model, names, tmp_path):
    dense = public_mask(model)
    dense["lm_head.weight"] = dense["model.embed_tokens.weight"].clone()
    torch.save(dense, tmp_path / "mask.bin")
    mask = read_allo(tmp_path / "mask.bin", names)
    assert list(mask.selections) == list(names.shapes)
    assert all(torch.equal(mask.dense(name), dense[name].bool()) for name in names.shapes)
    dense["lm_head.weight"][0, 0] = 1 - dense["lm_head.weight"][0, 0]
    torch.save(dense, tmp_path / "mask.bin")
    with pytest.raises(MaskError, match="one tied parameter, but differ"):
        read_allo(tmp_path / "mask.bin", names)


@pytest.mark.parametrize("value", [0.5, -1.0, 2.0, float("nan"), float("inf")])
def test_what_is_neither_0_nor_1_is_refused(model, names, tmp_path, value):
    dense = public_mask(model)
    dense["model.norm.weight"][3] = value
    torch.save(dense, tmp_path / "mask.bin")
    with pytest.raises(MaskError, match=r"mask.bin: 'model.norm.weight' holds .*0 and 1"):
        read_allo(tmp_path / "mask.bin", names)


def test_another_models_mask_is_refused(model, names, tmp_path):
    path = tmp_path / "mask.bin"
    dense = public_mask(model)
    for change, message in [
        ({"model.stranger.weight": torch.ones(2)}, "no parameter 'model.stranger.weight'"),
        ({"model.norm.weight": torch.ones(4)}, r"'model.norm.weight' has shape \(4,\).*\(32,\)"),
    ]:
        torch.save(dense | change, path)
        with pytest.raises(MaskError, match=message):
            read_allo(path, names)
    del dense["model.norm.weight"]
    torch.save(dense, path)
    with pytest.raises(MaskError, match=r"lacks 'model.norm.weight'"):
        read_allo(path, names)


class Malice:
    def __reduce__(self):
        return (os.system, ("touch owned",))


def test_no_code_of_a_pickle_is_run(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model.norm.weight": Malice()}, "mask.bin")
    with pytest.raises(MaskError, match=r"mask.bin: .*may be code, which is not run"):
        read_allo("mask.bin", names)
    assert not (tmp_path / "owned").exists()


def test_files_that_are_no_masks(names, tmp_path):
    path = tmp_path / "mask.bin"
    with pytest.raises(MaskError, match=r"mask.bin: cannot be read"):
        read_allo(path, names)
    for content in (b"", b"hello", b"PK\x03\x04 cut"):
        path.write_bytes(content)
        with pytest.raises(MaskError, match=r"mask.bin: "):
            read_allo(path, names)
    whole = tmp_path / "whole.bin"
    torch.save({"model.norm.weight": torch.ones(3000)}, whole)
    path.write_bytes(whole.read_bytes()[:-2000])
    with pytest.raises(MaskError, match=r"mask.bin: cannot be read"):
        read_allo(path, names)
    for content in ([torch.ones(2)], {}, {"model.norm.weight": 1}, {3: torch.ones(32)}):
        torch.save(content, path)
        with pytest.raises(MaskError, match=r"mask.bin: (holds no dict|.* no dense tensor)"):
            read_allo(path, names)
    torch.save({"model.norm.weight": torch.ones(32).to_sparse()}, path)
    with pytest.raises(MaskError, match="no dense tensor"):
        read_allo(path, names)


def test_the_old_format_of_torch_says_what_is_wrong(names, tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "m.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(MaskError, match=r"m.bin: cannot be read .*zipfile"):
        read_allo(tmp_path / "m.bin", names)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_adapts_exactly_the_layers_of_the_mask(kind, tmp_path):
    model = tiny_model(kind)
    names = ModelNames.of_model(model)
    mask = layer_mask(model)
    targets = peft_targets(mask, names)
    write_targets(targets, tmp_path / "ila.json", mask)
    assert read_targets(tmp_path / "ila.json") == targets
    back = mask_of_targets(targets, names)
    assert back == mask and back.metadata.granularity == "layer"
    inject_adapter_in_model(LoraConfig(r=2, target_modules=targets), model)
    adapted = {n.split(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A" in n}
    assert adapted == set(targets)


def test_the_tied_head_goes_by_its_modules_name(model, names):
    selections = {n: Selection.none(s) for n, s in names.shapes.items()}
    head = ParameterMask(selections | {"model.embed_tokens.weight": Selection.all((384, 32))})
    assert peft_targets(head, names) == ["lm_head"]
    assert mask_of_targets(["lm_head"], names) == head


def test_lists_are_read_as_peft_reads_them(names):
    def chosen(targets):
        selections = mask_of_targets(targets, names).selections
        return {n for n, s in selections.items() if s.kind == "all"}

    assert chosen(["q_proj"]) == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}
    assert chosen(r".*\.1\.mlp\.(up|down)_proj") == {
        f"model.layers.1.mlp.{way}_proj.weight" for way in ("up", "down")
    }
    assert chosen("all-linear") == set(names.modules) - {"model.embed_tokens.weight"}
    for targets, message in [
        (["proj"], "called 'proj'"),
        (["q_proj", "embed_tokens"], "called 'embed_tokens'"),
        ("q_proj", "fits no linear layer"),
        ("(", "no regular expression"),
    ]:
        with pytest.raises(MaskError, match=message):
            mask_of_targets(targets, names)


def test_masks_that_adapters_cannot_follow(model, names):
    with pytest.raises(MaskError, match=r"selects 50.00% of .*granularity layer"):
        half = {n: Selection.none(s) for n, s in names.shapes.items()}
        name = "model.layers.0.mlp.up_proj.weight"
        half[name] = Selection.of_rows(names.shapes[name], torch.arange(28))
        peft_targets(ParameterMask(half), names)
    with pytest.raises(MaskError, match=r"layernorm.*no linear layer"):
        peft_targets(~layer_mask(model), names)
    with pytest.raises(MaskError, match="selects no layer"):
        peft_targets(ParameterMask({n: Selection.none(s) for n, s in names.shapes.items()}), names)
    with pytest.raises(MaskError, match="which the model does not have"):
        peft_targets(ParameterMask({"w": Selection.all((2, 2))}), names)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "JSON"),
        ("[]", "no list of names"),
        ('{"target_modules": []}', "no list of names"),
        ('{"target_modules": [1]}', "no list of names"),
        ('{"target_modules": ["a"], "layers_to_transform": [3]}', "'layers_to_transform' is set"),
    ],
)
def test_lists_that_are_none(tmp_path, document, message):
    (tmp_path / "list.json").write_text(document)
    with pytest.raises(MaskError, match=f"list.json.*{message}"):
        read_targets(tmp_path / "list.json")


@pytest.mark.parametrize(
    "field",
    ["exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
     "target_parameters", "trainable_token_indices"],
)  # fmt: skip
def test_what_else_a_peft_config_adapts_is_no_list(tmp_path, field):
    assert field in LoraConfig.__dataclass_fields__  # under peft's own name
    document = {"target_modules": ["q_proj"], field: ["lm_head"]}
    (tmp_path / "list.json").write_text(json.dumps(document))
    with pytest.raises(MaskError, match=f"'{field}' is set"):
        read_targets(tmp_path / "list.json")
    (tmp_path / "list.json").write_text(json.dumps(document | {field: None}))
    assert read_targets(tmp_path / "list.json") == ["q_proj"]


def test_an_adapter_config_of_peft_is_a_list(tmp_path):
    LoraConfig(r=2, target_modules=["q_proj", "v_proj"]).save_pretrained(tmp_path)
    found = read_targets(tmp_path / "adapter_config.json")
    assert sorted(found) == ["q_proj", "v_proj"]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
