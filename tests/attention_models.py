"""Tiny random models of every layout of q, k and v that is known, built from nothing."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.tiny_models import tiny_tokenizer

COMMON = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FALCON = {"alibi": False, "bias": False, "ffn_hidden_size": 40}
# name → (model type, what differs)
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mha": ("llama", {"num_key_value_heads": 4}),
    "gqa": ("llama", {"num_key_value_heads": 2}),
    "mqa": ("llama", {"num_key_value_heads": 1}),
    "wide": ("qwen3", {"num_key_value_heads": 2, "head_dim": 10}),  # 4 · 10 is not 32
    "biased": ("qwen2", {"num_key_value_heads": 2}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}),
    "phi3": ("phi3", {"num_key_value_heads": 2}),
    "gpt_neox": ("gpt_neox", {}),
    "bloom": ("bloom", {"n_head": 4, "n_layer": 2}),
    "falcon_mqa": ("falcon", FALCON | {"multi_query": True, "new_decoder_architecture": False}),
    "falcon_mha": ("falcon", FALCON | {"multi_query": False, "new_decoder_architecture": False}),
    "falcon_gqa": ("falcon", FALCON | {"num_kv_heads": 2, "new_decoder_architecture": True}),
    "persimmon": ("persimmon", {}),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    "bigcode_mqa": ("gpt_bigcode", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}),
    "bigcode_mha": (
        "gpt_bigcode",
        {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "multi_query": False},
    ),
}


def attention_model(layout: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model in evaluation mode whose weights are larger than usual, so that heads matter."""
    model_type, differing = LAYOUTS[layout]
    torch.manual_seed(seed)
    names = {"gpt2", "gpt_bigcode", "mpt"}
    common = {k: v for k, v in COMMON.items() if model_type not in names or k.endswith("_id")}
    common |= {"vocab_size": 384}
    config = AutoConfig.for_model(model_type, **common | differing | changes)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


def save_pair(
    folder: Path, layout: str, change: float = 0.3, seed: int = 0
) -> tuple[Path, Path, PreTrainedModel, PreTrainedModel]:
    """A base and a task model that differs in all weights, saved; and the models themselves."""
    base, task = attention_model(layout, seed), attention_model(layout, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=change)
    for model, name in ((base, "base"), (task, "task")):
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder / "base", folder / "task", base, task
