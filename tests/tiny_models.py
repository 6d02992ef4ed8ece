"""Tiny random models and a tokenizer, built from nothing: no download and no ../shared."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CORPUS = [
    "Tom has 3 apples and buys 4 more. How many apples does Tom have now?",
    "3 + 4 = 7. The answer is: 7",
    "The quick brown fox jumps over the lazy dog. user assistant system Human Assistant",
    "Mia read 12 pages on Monday and 30 pages on Tuesday. 12 + 30 = 42. The answer is: 42",
] * 4
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a ChatML template; vocabulary of at most 384."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def tiny_model(kind: str = "llama", *, tied: bool = True, seed: int = 0) -> PreTrainedModel:
    """A random model: `llama` (GQA), `wide_llama` (heads of 16), `gpt2` (Conv1D) or `mixtral`."""
    torch.manual_seed(seed)
    if kind in ("llama", "wide_llama"):
        config = LlamaConfig(
            vocab_size=384,
            hidden_size=32 if kind == "llama" else 64,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=tied,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    elif kind == "gpt2":
        config = GPT2Config(
            vocab_size=384,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=512,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    elif kind == "mixtral":
        config = MixtralConfig(
            vocab_size=384,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    else:
        raise ValueError(kind)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def save_tiny_model(folder: Path, kind: str = "llama", seed: int = 0) -> Path:
    """Write a tiny model and its tokenizer as an ordinary Hugging Face folder."""
    tiny_model(kind, seed=seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
