from lit_align.data import SFTDataModule
from lit_align.pipelines.rewards.predictions import Prediction
from lit_align.pipelines.rewards.rewriting import rewriting_prompt, rewriting_rows
from tests.tiny_models import tiny_tokenizer

PROMPT = [{"role": "user", "content": "3 + 4?"}]
WRONG = Prediction(PROMPT, "3 + 4 = 8", "It is 7.")
RIGHT = Prediction(PROMPT, "3 + 4 = 7", "It is 7.")


def test_prompt_shows_problem_solution_and_prediction_in_this_order():
    [message] = rewriting_prompt(WRONG)
    assert message["role"] == "user"
    places = [message["content"].index(text) for text in ("3 + 4?", "It is 7.", "3 + 4 = 8")]
    assert places == sorted(places)


def test_braces_in_the_texts_are_only_text():
    prediction = Prediction("What is {x}?", " {0}", " {problem}")
    prompt = rewriting_prompt(prediction)
    assert isinstance(prompt, str)
    assert all(text in prompt for text in ("What is {x}?", "{0}", "{problem}"))


def test_rows_are_rewrites_and_identities():
    rows = rewriting_rows([WRONG, WRONG], ["3 + 4 = 7", None], [RIGHT])
    assert [row.prompt for row in rows] == [rewriting_prompt(WRONG), rewriting_prompt(RIGHT)]
    assert [row.response[0]["content"] for row in rows] == ["3 + 4 = 7", "3 + 4 = 7"]


def test_rows_train_the_reward_model_on_the_rewrite_alone():
    tokenizer = tiny_tokenizer()
    module = SFTDataModule.from_rows(tokenizer, {"train": rewriting_rows([WRONG], ["3 + 4 = 7"])})
    module.setup("fit")
    [sequence] = module.train_rows[0].sequences
    assert tokenizer.decode(sequence.response_ids) == "3 + 4 = 7<|im_end|>"
