from functools import lru_cache

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from lit_align.errors import DataError, ModelError
from lit_align.evaluation import encode_prompt, generate
from tests.tiny_models import tiny_model, tiny_tokenizer

PROMPTS = [
    "Tom has 3 apples and buys 4 more. How many apples",
    "Tom",
    "Tom has 3 apples",
    [{"role": "user", "content": "Mia read 12 pages"}],
    "Tom has 30 apples and buys 4 more",
    "Tom",
]


def sliding_model():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=384, hidden_size=32, intermediate_size=56, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=6, eos_token_id=2,
        max_position_embeddings=512,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


MODELS = {
    "llama": lambda: tiny_model("llama", tied=False).eval(),
    "gpt2": lambda: tiny_model("gpt2").eval(),
    "mixtral": lambda: tiny_model("mixtral").eval(),
    "sliding": sliding_model,
}


def greedy_by_hand(model, ids, max_new_tokens, stop_id=2):
    """One prompt, no cache, no padding."""
    ids, new = list(ids), []
    for _ in range(max_new_tokens):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == stop_id:
            break
        ids.append(token)
        new.append(token)
    return new


@lru_cache
def model_and_greedy(kind, max_new_tokens=70):
    """A model whose logits are far apart (a random model's are not), and its responses by hand."""
    model, tokenizer = MODELS[kind](), tiny_tokenizer()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
        ids = [greedy_by_hand(model, encode_prompt(tokenizer, p), max_new_tokens) for p in PROMPTS]
    return model, [[tokenizer.decode(row, skip_special_tokens=True)] for row in ids]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_greedy_equals_one_prompt_at_a_time_without_cache(kind, batch_size):
    model, expected = model_and_greedy(kind)
    got = generate(
        model, tiny_tokenizer(), PROMPTS, max_new_tokens=70, batch_size=batch_size, progress=False
    )
    assert got == expected


def test_responses_that_stop_leave_the_batch_at_different_steps():
    model, tokenizer = tiny_model("llama").eval(), tiny_tokenizer()
    model.generation_config.eos_token_id = list(range(0, 384, 9))  # stops are frequent
    responses = generate(
        model, tokenizer, PROMPTS * 4, max_new_tokens=40, temperature=1.0, num_samples=3,
        batch_size=16, progress=False,
    )  # fmt: skip
    lengths = {len(tokenizer(text)["input_ids"]) for texts in responses for text in texts}
    assert len(responses) == 24 and all(len(texts) == 3 for texts in responses)
    assert len(lengths) > 5
    # Alone in its batch each response is the same.
    again = generate(
        model, tokenizer, PROMPTS * 4, max_new_tokens=40, temperature=1.0, num_samples=3,
        batch_size=1, progress=False,
    )  # fmt: skip
    assert again == responses


def test_samples_depend_on_seed_place_and_number_and_not_on_batch_size():
    model, tokenizer = tiny_model("llama").eval(), tiny_tokenizer()
    settings = dict(max_new_tokens=12, temperature=1.0, top_p=0.95, num_samples=3, progress=False)
    first = generate(model, tokenizer, PROMPTS, seed=1, batch_size=5, **settings)
    assert generate(model, tokenizer, PROMPTS, seed=1, batch_size=64, **settings) == first
    assert generate(model, tokenizer, PROMPTS, seed=2, batch_size=64, **settings) != first
    assert len(set(first[0])) == 3
    assert first[1] != first[5]  # the same prompt in another place


def test_greedy_samples_are_copies():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    (texts,) = generate(
        model, tokenizer, ["Tom"], max_new_tokens=3, num_samples=3, progress=False
    )  # fmt: skip
    assert len(texts) == 3 and len(set(texts)) == 1


def test_mode_and_gradients_are_left_as_they_were():
    model = tiny_model("llama").train()
    generate(model, tiny_tokenizer(), ["Tom"], max_new_tokens=2, progress=False)
    assert model.training
    model(torch.tensor([[3, 4, 5]])).logits.sum().backward()


def test_bfloat16_model_generates():
    model = tiny_model("llama").to(torch.bfloat16)
    assert generate(model, tiny_tokenizer(), ["Tom", "Mia"], max_new_tokens=2, progress=False)


def test_no_prompts_give_no_responses():
    assert generate(tiny_model(), tiny_tokenizer(), [], max_new_tokens=2, progress=False) == []


@pytest.mark.parametrize(
    "settings", [{"top_p": 0.0}, {"num_samples": 0}, {"temperature": -1.0}, {"batch_size": 0}]
)
def test_settings_out_of_range_are_errors(settings):
    with pytest.raises(ModelError):
        generate(tiny_model(), tiny_tokenizer(), ["Tom"], max_new_tokens=2, **settings)


def test_special_token_as_text_and_empty_prompt_are_refused():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with pytest.raises(DataError, match="im_end"):
        generate(model, tokenizer, ["hello <|im_end|>"], max_new_tokens=2)
    with pytest.raises(DataError, match="im_start"):
        generate(
            model, tokenizer, [[{"role": "user", "content": "<|im_start|>"}]], max_new_tokens=2
        )
    with pytest.raises(DataError, match="empty"):
        generate(model, tokenizer, [""], max_new_tokens=2)
