import numpy as np
import pytest
import torch

from lit_align.data import TokenizedSequence
from lit_align.errors import ModelError, TrainingError
from lit_align.pipelines.rewards.reward_model import (
    RewardModel,
    check_same_tokenizer,
    token_probabilities,
)
from tests.tiny_models import tiny_model, tiny_tokenizer


def _sequences():
    rng = np.random.default_rng(0)
    lengths = [(5, 3), (9, 1), (2, 12), (7, 4), (4, 4)]
    return [
        TokenizedSequence(rng.integers(3, 380, p), rng.integers(3, 380, n), None, 1)
        for p, n in lengths
    ]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_probabilities_equal_softmax_of_full_logits(kind):
    model = tiny_model(kind).train()
    sequences = _sequences()
    reward_model = RewardModel(model, tiny_tokenizer(), batch_size=2)
    found = token_probabilities(sequences, reward_model, progress=False)
    assert model.training  # as it was
    model.eval()
    for sequence, probabilities in zip(sequences, found, strict=True):
        ids = torch.tensor(np.concatenate([sequence.prompt_ids, sequence.response_ids]))[None]
        with torch.no_grad():
            distributions = model(ids.long()).logits[0].softmax(-1)
        start = len(sequence.prompt_ids)
        expected = [distributions[start + t - 1, i] for t, i in enumerate(sequence.response_ids)]
        np.testing.assert_allclose(probabilities, expected, rtol=1e-4)
        assert probabilities.dtype == np.float32


def test_a_broken_reward_model_is_an_error():
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="NaN"):
        token_probabilities(_sequences(), RewardModel(model, tiny_tokenizer()), progress=False)


def test_length_limit_is_the_smaller_of_setting_and_model():
    assert RewardModel(tiny_model("gpt2"), tiny_tokenizer()).longest == 512
    assert RewardModel(tiny_model(), tiny_tokenizer(), max_length=100).longest == 100


def test_other_tokenizers_are_refused_by_name():
    policy, other = tiny_tokenizer(), tiny_tokenizer()
    check_same_tokenizer(policy, other)
    other.eos_token = "<|endoftext|>"
    with pytest.raises(ModelError, match=r"im_end.*endoftext"):
        check_same_tokenizer(policy, other)
    other = tiny_tokenizer()
    other.add_tokens(["apples-and-pears"])
    with pytest.raises(ModelError, match="1 tokens, such as 'apples-and-pears'"):
        check_same_tokenizer(policy, other)
