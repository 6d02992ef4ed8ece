import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_align.errors import LocalizationError, ModelError
from lit_align.localizers.stored import StoredParameters, parameter_shapes
from lit_align.masks import named_shapes
from tests.tiny_models import tiny_model


def assert_reads(stored, model):
    for name, parameter in model.named_parameters():
        assert stored.read(name).dtype == torch.float32
        assert torch.equal(stored.read(name), parameter.float()), name


def forbid_loading(monkeypatch):
    def load(*_):
        raise AssertionError("loaded the whole model")

    monkeypatch.setattr("lit_align.localizers.stored._load_converted", load)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_reads_a_folder_tensor_by_tensor(tmp_path, monkeypatch, kind, shard):
    model = tiny_model(kind)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (shard == "20KB") == (tmp_path / "model.safetensors.index.json").is_file()
    forbid_loading(monkeypatch)
    assert_reads(StoredParameters(tmp_path, named_shapes(model)), model)


def test_reads_bf16_as_fp32(tmp_path, monkeypatch):
    model = tiny_model("llama").bfloat16()
    model.save_pretrained(tmp_path)
    forbid_loading(monkeypatch)
    stored = StoredParameters(tmp_path, named_shapes(model))
    assert set(stored.dtypes.values()) == {torch.bfloat16}
    assert_reads(stored, model)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])  # read from the file; converted in memory
def test_parts_are_those_of_the_whole(tmp_path, kind):
    model = tiny_model(kind).bfloat16()
    model.save_pretrained(tmp_path)
    stored = StoredParameters(tmp_path, named_shapes(model))
    for name in ("model.norm.weight", "model.layers.1.self_attn.o_proj.weight"):
        whole = stored.read(name).reshape(-1)
        for start, stop in ((0, 1), (3, 32), (0, whole.numel()), (7, 7)):
            part = stored.part(name, start, stop)
            assert part.dtype == torch.float32 and torch.equal(part, whole[start:stop])
            part.zero_()
        assert torch.equal(stored.read(name).reshape(-1), whole)


def test_a_file_that_shrinks_is_a_model_error(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    stored = StoredParameters(tmp_path, named_shapes(model))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ModelError, match="cut off"):
        for name in stored.shapes:
            stored.read(name)


def test_a_size_that_is_not_the_shapes_is_a_model_error(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"dtype":"F32"', b'"dtype":"F16"', 1))
    with pytest.raises(ModelError, match="not the size of its shape"):
        StoredParameters(tmp_path, named_shapes(model))


def test_what_is_read_may_be_written_to(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    stored = StoredParameters(tmp_path, named_shapes(model))
    stored.read("model.norm.weight").zero_()
    assert_reads(stored, model)


def test_experts_that_are_stored_apart_are_joined(tmp_path):
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "model.safetensors"))
    assert "model.layers.0.mlp.experts.gate_up_proj" not in keys
    assert_reads(StoredParameters(tmp_path, named_shapes(model)), model)


def test_keys_without_the_models_prefix_are_found(tmp_path):
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {k.removeprefix("transformer."): t for k, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    assert_reads(StoredParameters(tmp_path, named_shapes(model)), model)


def test_shapes_of_a_folder_without_loading_it(tmp_path):
    for kind in ("llama", "gpt2", "mixtral"):
        model = tiny_model(kind)
        model.config.save_pretrained(tmp_path / kind)
        assert parameter_shapes(tmp_path / kind) == named_shapes(model)
    with pytest.raises(ModelError, match="no config"):
        parameter_shapes(tmp_path)


def test_another_models_parameters_are_refused(tiny_llama_dir):
    shapes = named_shapes(tiny_model("llama"))
    with pytest.raises(LocalizationError, match=r"no parameter 'lm_head\.bias'"):
        StoredParameters(tiny_llama_dir, shapes | {"lm_head.bias": (384,)})
    with pytest.raises(LocalizationError, match=r"'model\.norm\.weight' has shape \(32,\)"):
        StoredParameters(tiny_llama_dir, shapes | {"model.norm.weight": (33,)})


def test_integer_weights_are_refused(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LocalizationError, match=rf"{name}.*I8"):
        StoredParameters(tmp_path, named_shapes(model))


def test_damaged_folders_are_model_errors(tmp_path):
    shapes = named_shapes(tiny_model("llama"))
    with pytest.raises(ModelError):
        StoredParameters(tmp_path, shapes)
    tiny_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ModelError, match="damaged or truncated"):
        StoredParameters(tmp_path, shapes)
    file.unlink()
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "absent.safetensors"}})
    )
    with pytest.raises(ModelError, match="absent"):
        StoredParameters(tmp_path, shapes)
