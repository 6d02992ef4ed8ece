import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_align import gguf_alias
from lit_align.errors import ModelError
from lit_align.language_model import (
    fingerprint,
    load_language_model,
    load_tokenizer,
    resolve_model,
    save_language_model,
    weight_files,
)
from tests.tiny_models import tiny_model, tiny_tokenizer


def test_load_gives_fp32_model_with_fingerprint_and_folder(tiny_llama_dir):
    model, tokenizer = load_language_model(tiny_llama_dir)
    assert model.dtype == torch.float32
    assert not model.training
    assert model.base_fingerprint == fingerprint(tiny_llama_dir)
    assert model.base_dir == tiny_llama_dir
    assert tokenizer.decode(tokenizer("Tom has 3 apples").input_ids) == "Tom has 3 apples"


def test_dtype_is_honoured_and_does_not_change_the_fingerprint(tiny_llama_dir):
    model, _ = load_language_model(str(tiny_llama_dir), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.base_fingerprint == fingerprint(tiny_llama_dir)


def test_tokenizer_without_pad_token_pads_with_eos(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token_id == loaded.eos_token_id


def test_local_looking_names_never_ask_the_hub(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("network call")

    monkeypatch.setattr("lit_align.language_model.snapshot_download", refuse)
    for name in [tmp_path / "absent", "./absent", "~/absent-folder", "a/b/c", str(tmp_path / "x")]:
        with pytest.raises(ModelError, match="no such folder"):
            resolve_model(name)


def test_unknown_hub_id_is_a_model_error():
    with pytest.raises(ModelError, match="neither a local folder nor the alias"):
        resolve_model("nobody/no-such-model")  # the tests run with HF_HUB_OFFLINE=1


def test_fingerprint_ignores_sharding_and_sees_one_bit(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(weight_files(tmp_path / "many")) > 1
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "many")
    before = fingerprint(tmp_path / "one")
    file = tmp_path / "one" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert fingerprint(tmp_path / "one") != before


def test_fingerprint_sees_names_dtypes_and_shapes(tmp_path):
    variants = [
        {"a": torch.zeros(4)},
        {"b": torch.zeros(4)},
        {"a": torch.zeros(2, 2)},
        {"a": torch.zeros(4, dtype=torch.int32)},
    ]
    digests = set()
    for i, tensors in enumerate(variants):
        (tmp_path / str(i)).mkdir()
        save_file(tensors, tmp_path / str(i) / "model.safetensors")
        digests.add(fingerprint(tmp_path / str(i)))
    assert len(digests) == len(variants)


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _huge_header(file: Path) -> None:
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


def _not_json(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[8] = ord("!")
    file.write_bytes(raw)


@pytest.mark.parametrize("damage", [_truncate, _huge_header, _not_json])
def test_damaged_weights_are_a_model_error_that_names_the_file(tmp_path, tiny_llama_dir, damage):
    folder = shutil.copytree(tiny_llama_dir, tmp_path / "copy")
    damage(folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_language_model(folder)


def test_folder_without_weights_and_index_that_leads_out_are_model_errors(tmp_path, tiny_llama_dir):
    with pytest.raises(ModelError, match="has no model"):
        fingerprint(tmp_path)
    outside = {"weight_map": {"x": f"../{tiny_llama_dir.name}/model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(outside))
    with pytest.raises(ModelError, match="is not a file in"):
        fingerprint(tmp_path)


def test_save_replaces_a_model_whole_and_leaves_nothing_behind(tmp_path):
    folder = tmp_path / "out"
    for seed in (0, 1):
        save_language_model(tiny_model(seed=seed), tiny_tokenizer(), folder)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    loaded, _ = load_language_model(folder)
    expected = tiny_model(seed=1).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_save_refuses_a_folder_that_holds_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="not replaced"):
        save_language_model(tiny_model(), tiny_tokenizer(), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("other", ["checkpoint-500/model.safetensors", "notes.md"])
def test_what_stands_beside_a_model_is_not_lost(other, tmp_path):
    folder = tmp_path / "model"
    save_language_model(tiny_model(seed=0), tiny_tokenizer(), folder)
    (folder / other).parent.mkdir(exist_ok=True)
    (folder / other).write_text("mine")
    with pytest.raises(ModelError, match=f"holds '{other.split('/')[0]}'; not replaced"):
        save_language_model(tiny_model(seed=1), tiny_tokenizer(), folder)
    assert (folder / other).read_text() == "mine"


def test_failed_save_keeps_the_old_model(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    save_language_model(tiny_model(seed=0), tiny_tokenizer(), folder)
    before = fingerprint(folder)
    tokenizer = tiny_tokenizer()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        save_language_model(tiny_model(seed=1), tokenizer, folder)
    assert fingerprint(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_real_stories_model_keeps_its_weights_through_save(tmp_path, shared_dir):
    base = shared_dir / "models" / "stories260K_hf"
    model, tokenizer = load_language_model(base)
    save_language_model(model, tokenizer, tmp_path / "copy")
    ours = load_file(tmp_path / "copy" / "model.safetensors")
    theirs = load_file(base / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_alias_is_checked_before_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("lit_align.language_model.alias_dir", lambda: tmp_path)
    assert resolve_model(gguf_alias.ALIAS) == tmp_path
