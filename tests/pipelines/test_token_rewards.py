import json
from pathlib import Path

import numpy as np
import pytest

from lit_align.data import UnlearningDataModule, UnlearningRow
from lit_align.errors import DataError, ModelError, TrainingError
from lit_align.gguf_alias import ALIAS, cache_dir
from lit_align.language_model import load_tokenizer
from lit_align.pipelines.rewards import token_rewards
from lit_align.pipelines.rewards.predictions import Prediction
from lit_align.pipelines.rewards.reward_model import RewardModel, token_probabilities
from lit_align.pipelines.rewards.rewriting import rewriting_prompt
from lit_align.pipelines.rewards.token_rewards import probability_weights, weighted_rows
from tests.tiny_models import tiny_model, tiny_tokenizer

CHAT = Prediction(
    [{"role": "user", "content": "Tom has 3 apples and buys 4 more."}],
    "3 + 4 = 4. The answer is: 4",
    "3 + 4 = 7. The answer is: 7",
    {"id": "tom/0"},
)
TEXT = Prediction("Q: How many apples?\nA:", " 3 + 4 = 4", " 3 + 4 = 7", {"id": "text"})


@pytest.fixture
def reward_model():
    return RewardModel(tiny_model(seed=1), tiny_tokenizer(), batch_size=2)


def trained_rows(rows, tokenizer, folder: Path | None = None):
    """What the data module makes of rows: given as they are, or read from a file."""
    if folder is None:
        typed = [UnlearningRow(r["prompt"], r["response"], r["token_weights"]) for r in rows]
        module = UnlearningDataModule.from_rows(tokenizer, {"train": typed})
    else:
        file = folder / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        module = UnlearningDataModule(tokenizer, str(file))
    module.setup("fit")
    return [row.sequences[0] for row in module.train_rows]


def test_rules_by_hand():
    p = np.array([0.9, 0.5, 0.2], np.float32)
    np.testing.assert_array_equal(probability_weights(p, "binary"), [0, 0, 1])
    np.testing.assert_array_equal(probability_weights(p, "binary", 0.6), [0, 1, 1])
    np.testing.assert_allclose(probability_weights(p, "soft"), [0.1, 0.5, 0.8], atol=1e-6)
    np.testing.assert_array_equal(probability_weights(p, "raw"), p)


# 3| +| 4| =| 4|.| The| answer| is|:| 4|EOS and  3| +| 4| =| 4|EOS
@pytest.mark.parametrize(("prediction", "wrong_tokens"), [(CHAT, [4, 10]), (TEXT, [4])])
def test_edit_marks_the_wrong_tokens_alone(prediction, wrong_tokens):
    tokenizer = tiny_tokenizer()
    rows, statistics = weighted_rows([prediction], [prediction.solution], tokenizer, rule="edit")
    [sequence] = trained_rows(rows, tokenizer)
    assert np.flatnonzero(sequence.token_weights).tolist() == wrong_tokens
    assert set(sequence.token_weights.tolist()) == {0.0, 1.0}
    assert len(sequence.response_ids) == (12 if prediction is CHAT else 6)
    assert rows[0]["correction"] == prediction.solution
    assert rows[0]["id"] == prediction.row["id"]
    assert statistics["weighted_tokens"] == len(wrong_tokens)
    assert statistics["weighted_share"] == len(wrong_tokens) / len(sequence.response_ids)


@pytest.mark.parametrize("rule", ["binary", "soft", "raw"])
def test_weights_are_those_of_the_tokens_that_the_policy_is_trained_on(
    rule, reward_model, tmp_path
):
    tokenizer = tiny_tokenizer()
    predictions = [CHAT, TEXT]
    rows, statistics = weighted_rows(
        predictions, [None, None], tokenizer, rule=rule, reward_model=reward_model, progress=False
    )
    assert statistics["rows"] == 2 and statistics["dropped"] == {}
    assert [row["correction"] for row in rows] == [None, None]
    in_memory, from_file = trained_rows(rows, tokenizer), trained_rows(rows, tokenizer, tmp_path)
    for prediction, sequence, again in zip(predictions, in_memory, from_file, strict=True):
        np.testing.assert_array_equal(sequence.response_ids, again.response_ids)
        np.testing.assert_array_equal(sequence.token_weights, again.token_weights)
        assert sequence.response_ids[-1] == tokenizer.eos_token_id
        # The response of the policy's row, after the rewriting prompt.
        prompt = rewriting_prompt(prediction)
        asked = UnlearningRow(prompt, prediction.as_response(prediction.response))
        module = UnlearningDataModule.from_rows(tokenizer, {"train": [asked]})
        module.setup("fit")
        [expected] = module.train_rows[0].sequences
        np.testing.assert_array_equal(expected.response_ids, sequence.response_ids)
        [p] = token_probabilities([expected], reward_model, progress=False)
        np.testing.assert_allclose(
            sequence.token_weights, probability_weights(p, rule), rtol=1e-4, atol=1e-7
        )
    json.dumps(statistics)


def test_a_long_response_is_weighted_whole_and_truncated_by_the_data_module():
    tokenizer = tiny_tokenizer()
    response = "3 + 4 = 12. " * 60
    long = Prediction(CHAT.prompt, response, response.replace("12", "42"))
    [row] = weighted_rows([long], [long.solution], tokenizer, rule="edit").rows
    typed = UnlearningRow(row["prompt"], row["response"], row["token_weights"])
    module = UnlearningDataModule.from_rows(tokenizer, {"train": [typed]}, max_length=100)
    module.setup("fit")
    [sequence] = module.train_rows[0].sequences
    assert sequence.truncated and len(sequence.token_weights) < len(row["token_weights"])
    np.testing.assert_array_equal(
        sequence.token_weights, row["token_weights"][: len(sequence.token_weights)]
    )
    assert 0 < sequence.token_weights.mean() < 0.5


def test_dropped_rows_are_counted_by_reason():
    bad = [
        Prediction(CHAT.prompt, " ", "7"),
        Prediction(CHAT.prompt, "8<|im_end|>", "7"),
        Prediction(CHAT.prompt, "8\x00", "7"),
        Prediction(CHAT.prompt, "3 + 4", "3 + 4 = 7"),  # insertions alone
        Prediction(CHAT.prompt, "8", "7"),
    ]
    corrections = ["7", "7", "7", "3 + 4 = 7", None]
    rows, statistics = weighted_rows(
        [CHAT, *bad], [CHAT.solution, *corrections], tiny_tokenizer(), rule="edit"
    )
    assert len(rows) == statistics["rows"] == 1
    assert statistics["predictions"] == 6
    assert statistics["dropped"] == {
        "control character": 1, "no correction": 1, "no response": 1, "no weighted token": 1,
        "special token as text": 1,
    }  # fmt: skip


def test_what_the_reward_model_cannot_take_is_dropped(reward_model):
    long = Prediction(CHAT.prompt, "3 + 4 = 8. " * 100, "7")
    arguments = {"rule": "soft", "reward_model": reward_model, "progress": False}
    _, statistics = weighted_rows([long, CHAT], [None, None], tiny_tokenizer(), **arguments)
    assert statistics["dropped"] == {"longer than max_length": 1}
    with pytest.raises(DataError, match="1 x longer than max_length"):
        weighted_rows([long], [None], tiny_tokenizer(), **arguments)


def test_no_token_below_the_threshold_no_row(monkeypatch, reward_model):
    certain = [np.ones(3, np.float32), np.array([0.7, 0.4, 1.0], np.float32)]
    monkeypatch.setattr(token_rewards, "token_probabilities", lambda *_, **__: certain)
    rows, statistics = weighted_rows(
        [CHAT, TEXT], [None, None], tiny_tokenizer(), reward_model=reward_model
    )
    assert [row["token_weights"] for row in rows] == [[0.0, 1.0, 0.0]]
    assert statistics["dropped"] == {"no weighted token": 1}
    assert (statistics["tokens"], statistics["weighted_tokens"]) == (3, 1)


def test_settings_that_cannot_be(reward_model):
    tokenizer = tiny_tokenizer()
    with pytest.raises(TrainingError, match="need a reward model"):
        weighted_rows([CHAT], [None], tokenizer)
    with pytest.raises(TrainingError, match=r"hard.: binary"):
        weighted_rows([CHAT], [None], tokenizer, rule="hard")
    with pytest.raises(TrainingError, match="threshold"):
        weighted_rows([CHAT], [None], tokenizer, reward_model=reward_model, threshold=0)
    tokenizer.add_tokens(["one-more"])
    with pytest.raises(ModelError, match="one-more"):
        weighted_rows([CHAT], [None], tokenizer, reward_model=reward_model)


def check_on(tokenizer, prediction, wrong_tokens):
    rows, _ = weighted_rows([prediction], [prediction.solution], tokenizer, rule="edit")
    [sequence] = trained_rows(rows, tokenizer)
    marked = sequence.response_ids[sequence.token_weights == 1]
    assert [tokenizer.decode([i]).strip() for i in marked] == wrong_tokens


def test_a_sentencepiece_tokenizer(shared_dir):
    """A space before a text's first word is its own; plain text."""
    tokenizer = load_tokenizer(shared_dir / "models" / "stories260K_hf")
    check_on(tokenizer, TEXT, ["4"])


def test_smollm2_tokens():
    """On the default model's tokenizer, where its folder stands in the cache already."""
    folders = list(cache_dir().glob(f"{ALIAS}-*/tokenizer.json"))
    if not folders:
        pytest.skip(f"{ALIAS} is not in the cache")
    check_on(load_tokenizer(folders[0].parent), CHAT, ["4", "4"])
