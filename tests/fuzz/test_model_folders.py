"""Model folders that ask for more than they hold, or for code and weights that lie elsewhere."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_align.compact.adapter_files import save_adapters
from lit_align.compact.adapters import AdapterSettings, add_adapters
from lit_align.errors import LitAlignError, ModelError
from lit_align.language_model import load_language_model, load_tokenizer
from lit_align.localizers.stored import meta_model
from lit_align.planning.model_configs import read_config, weightless_model
from tests.fuzz.limits import little_memory
from tests.tiny_models import save_tiny_model, tiny_model

HUGE = 10**10


def spoil_config(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("kind", "settings", "absent", "message"),
    [
        ("llama", {"vocab_size": HUGE}, ["embed_tokens"], "asks for 320000017056 values in param"),
        ("llama", {"head_dim": HUGE}, ["_proj"], "values in parameters"),
        ("llama", {"hidden_size": 1 << 29, "head_dim": 8}, ["weight"], "has no|0 tensors"),
        ("llama", {"num_hidden_layers": 9999}, [], "is 9999, and the files have 20 tensors"),
        ("llama", {"num_hidden_layers": 2**31}, [], "no model has so many"),
        ("llama", {"num_labels": 10**9}, [], "no model has so many"),
        ("llama", {"model_type": "musicgen_decoder", "num_codebooks": 10**9}, [], "no model has"),
        ("llama", {"intermediate_size": 2**62}, [], "overflow"),
        ("gpt2", {"n_positions": 10**6}, ["wpe"], "values in parameters"),
        ("mixtral", {"num_local_experts": 9999}, ["experts"], "values in parameters"),
    ],
)
def test_what_no_file_holds_is_not_allocated(tmp_path, kind, settings, absent, message):
    folder = save_tiny_model(tmp_path / "model", kind)
    tensors = load_file(folder / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if not any(each in n for each in absent)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    spoil_config(folder, **settings)
    with little_memory(), pytest.raises(ModelError, match=message):
        load_language_model(folder)


def test_a_tokenizers_folder_with_a_billion_layers(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    spoil_config(folder, model_type="qwen2", num_hidden_layers=10**9)  # it lists their kinds
    with little_memory(), pytest.raises(ModelError, match="no model has so many"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("program", ["stranger/kernel", {"": "stranger/kernel@v1:f"}, 5])
def test_no_program_is_fetched_from_the_hub(tmp_path, name, program):
    folder = save_tiny_model(tmp_path / "model", "mixtral")
    spoil_config(folder, **{name: program})
    for read in (load_language_model, load_tokenizer, meta_model, read_config):
        with pytest.raises(ModelError, match=f"'{name}' is .*is not run"):
            read(str(folder))


def test_names_of_known_programs_stay_allowed(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    spoil_config(folder, _attn_implementation="eager", experts_implementation=None)
    load_language_model(folder)
    with torch.device("meta"):
        weightless_model(read_config(str(folder)), torch.float32)


def test_adapters_in_a_models_folder_do_not_change_it_unasked(tmp_path):
    """transformers adds them, and the fingerprint of the weights would not show it."""
    folder, model = save_tiny_model(tmp_path / "model"), tiny_model()
    add_adapters(model, AdapterSettings(rank=2, layers=["q_proj"]))
    for file in save_adapters(model, tmp_path / "adapters").iterdir():
        file.rename(folder / file.name)
    with pytest.raises(ModelError, match=r"holds adapter_config\.json"):
        load_language_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(LitAlignError):
        load_language_model(folder)


@pytest.mark.parametrize("names", [["../other/tokenizer.0.0.json"], "tokenizer.json/..", [5]])
def test_a_tokenizer_is_read_from_its_own_folder(tmp_path, names):
    folder = save_tiny_model(tmp_path / "model")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"fast_tokenizer_files": ["tokenizer.json"]}))
    load_tokenizer(folder)
    path.write_text(json.dumps(settings | {"fast_tokenizer_files": names}))
    with pytest.raises(ModelError, match="which is no file in its folder"):
        load_tokenizer(folder)


@pytest.mark.timeout(20)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_a_pipe_in_a_models_folder_is_not_waited_for(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    for read in (load_language_model, load_tokenizer):
        with pytest.raises(ModelError, match="is no plain file"):
            read(folder)
