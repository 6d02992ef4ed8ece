"""Adapters on disk: peft reads what is written, and what peft writes is read."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from lit_align.compact import (
    AdapterSettings,
    add_adapters,
    apply_adapters,
    apply_delta,
    export_delta,
    load_adapters,
    save_adapters,
)
from lit_align.compact.adapters import adapted_layers
from lit_align.errors import ModelError
from lit_align.language_model import load_language_model
from tests.compact.test_adapters import MODELS, QUERY, adapted, randomise, token_ids
from tests.tiny_models import tiny_model
from tests.training_runs import random_mask

pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has:UserWarning", "ignore:fan_in:UserWarning", "ignore:.*deprecated"
)
WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize("kind", ["lora", "adalora"])
@pytest.mark.parametrize(("architecture", "tied"), MODELS)
@torch.no_grad()
def test_peft_reads_the_folder_and_gives_equal_logits(architecture, tied, kind, tmp_path):
    model, ids = adapted(architecture, tied, kind=kind).eval(), token_ids()
    save_adapters(model, tmp_path / "adapters")
    stored = load_file(tmp_path / "adapters" / WEIGHTS)
    assert all("lora_" in name for name in stored)  # no head, no embedding goes along
    base = tiny_model(architecture, tied=tied).eval()
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapters"))
    assert torch.equal(theirs(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["lora", "adalora"])
@pytest.mark.parametrize(("architecture", "tied"), MODELS)
@torch.no_grad()
def test_the_change_read_back_is_that_of_the_adapters(architecture, tied, kind, tmp_path):
    model, ids = adapted(architecture, tied, kind=kind), token_ids()
    save_adapters(model, tmp_path / "adapters")
    base = tiny_model(architecture, tied=tied)
    changes = load_adapters(tmp_path / "adapters", base)
    assert list(changes) == adapted_layers(model)
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    for name, layer in zip(changes, layers, strict=True):
        expected = layer.get_delta_weight("default")
        found = changes[name].scale * changes[name].b @ changes[name].a
        found = found.t() if getattr(layer, "fan_in_fan_out", False) else found
        torch.testing.assert_close(found, expected)
    apply_adapters(base, tmp_path / "adapters")
    torch.testing.assert_close(
        base(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "settings",
    [{"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}, {"target_modules": "all-linear"}],
)
@torch.no_grad()
def test_folders_of_pefts_own(settings, tmp_path):
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head"]} | settings
    )
    theirs, ids = get_peft_model(tiny_model(), config), token_ids()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    model = tiny_model()
    apply_adapters(model, tmp_path / "peft")
    torch.testing.assert_close(
        model(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-5, atol=1e-5
    )


def test_older_adapters_are_replaced_and_nothing_else_is(tmp_path):
    save_adapters(adapted(layers=["lm_head"]), tmp_path / "adapters")
    model = adapted(layers=["q_proj"])
    save_adapters(model, tmp_path / "adapters")
    assert list(load_adapters(tmp_path / "adapters", tiny_model())) == adapted_layers(model)
    assert [p.name for p in tmp_path.iterdir()] == ["adapters"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(ModelError, match=r"holds 'a.txt'; not replaced"):
        save_adapters(model, tmp_path / "notes")
    kept = tmp_path / "adapters" / "checkpoint-500"  # as a run of TRL's leaves them
    kept.mkdir()
    with pytest.raises(ModelError, match=r"holds 'checkpoint-500'; not replaced"):
        save_adapters(model, tmp_path / "adapters")
    assert kept.exists()


def test_a_plain_model_has_no_adapters_to_save(tmp_path):
    with pytest.raises(ModelError, match="has no adapters"):
        save_adapters(tiny_model(), tmp_path / "adapters")


# ---- bad folders ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return save_adapters(adapted(layers=["q_proj"]), tmp_path / "adapters")


def edit_config(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def put(folder, name, tensor):
    """Store a tensor under a name; None: take it out."""
    tensors = load_file(folder / WEIGHTS)
    tensors.pop(name, None)
    tensors |= {} if tensor is None else {name: tensor}
    save_file(tensors, folder / WEIGHTS)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json is damaged"),
        (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS}: missing or damaged"),
        (lambda f: (f / WEIGHTS).write_bytes(b"x" * 99), f"{WEIGHTS}: missing or damaged"),
        (lambda f: (f / "lit_align.json").write_text("[]"), "lit_align.json is damaged"),
        (lambda f: edit_config(f, use_dora=True), "adapters with use_dora are not read"),
        (lambda f: edit_config(f, modules_to_save=["norm"]), "with modules_to_save"),
        (lambda f: edit_config(f, alpha_pattern={"q_proj": 3}), "with alpha_pattern"),
        (lambda f: edit_config(f, peft_type="IA3"), "LoRA and AdaLoRA are read"),
        (lambda f: put(f, A, None), f"{QUERY} has .'lora_B'."),
        (lambda f: put(f, "x.lora_A.weight", torch.ones(4, 32)), "'x.lora_A.weight'"),
        (lambda f: put(f, A, torch.ones(2, 32)), r"A \(2, 32\) and B \(32, 4\)"),
        (lambda f: put(f, A, torch.ones(4, 9)), r"\(32, 9\) \(out, in\) and the layer \(32, 32\)"),
    ],
)  # fmt: skip
def test_a_bad_folder_is_named_with_its_fault(spoil, message, folder):
    spoil(folder)
    with pytest.raises(ModelError, match=message):
        load_adapters(folder, tiny_model())


def test_adapters_of_another_architecture(folder):
    with pytest.raises(ModelError, match="no factor of a linear layer of this model"):
        load_adapters(folder, tiny_model("gpt2"))


def test_adapters_of_another_base(tiny_llama_dir, tmp_path):
    model, _ = load_language_model(tiny_llama_dir)
    model.base_fingerprint = "a" * 64
    add_adapters(model, AdapterSettings(rank=2))
    save_adapters(model, tmp_path / "adapters")
    base, _ = load_language_model(tiny_llama_dir)
    with pytest.raises(ModelError, match="fingerprint aaaa"):
        load_adapters(tmp_path / "adapters", base)


def test_adapters_of_a_base_with_a_delta(tiny_llama_dir, tmp_path):
    model, _ = load_language_model(tiny_llama_dir)
    export_delta(model, tmp_path / "delta", random_mask())
    apply_delta(model, tmp_path / "delta")
    add_adapters(model, AdapterSettings(rank=2))
    save_adapters(model, tmp_path / "adapters")
    base, _ = load_language_model(tiny_llama_dir)
    with pytest.raises(ModelError, match="with a delta: load it with it"):
        load_adapters(tmp_path / "adapters", base)
    apply_delta(base, tmp_path / "delta")
    assert len(load_adapters(tmp_path / "adapters", base)) == 15
