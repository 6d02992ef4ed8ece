import pytest
import torch

from lit_align.errors import DataError
from lit_align.evaluation import response_logps
from tests.evaluation.test_generation import MODELS

PROMPTS = [[5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 10, 11, 12, 13, 14, 15], [5, 6, 7, 8, 9]]
RESPONSES = [[[20], [21, 22, 23]], [[30, 31]], [[40, 41, 42, 43], [44], [45, 46]], [[1, 2], [3, 4]]]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_equals_the_plain_forward_of_each_whole_sequence(kind, batch_size):
    model = MODELS[kind]()
    scored = response_logps(
        model, PROMPTS, RESPONSES, pad_id=0, batch_size=batch_size, progress=False
    )  # fmt: skip
    for prompt, group, logps in zip(PROMPTS, RESPONSES, scored, strict=True):
        for response, got in zip(group, logps, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + response])).logits[0]
            rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            expected = rows[torch.arange(len(response)), torch.tensor(response)]
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


def test_empty_response_is_an_error():
    with pytest.raises(DataError, match="no tokens"):
        response_logps(MODELS["llama"](), [[1]], [[[]]], pad_id=0)
