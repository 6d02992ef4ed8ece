"""The rewriting task, on which the token reward model is trained and by which it is asked."""

from __future__ import annotations

from collections.abc import Sequence

from lit_align.data.schema import Message, SFTRow
from lit_align.pipelines.rewards.predictions import Prediction

REWRITING_PROMPT = """\
Problem:
{problem}

Correct solution:
{solution}

Prediction:
{response}

Rewrite the prediction into a correct one with as few changes as possible."""
TEXT_ENDING = "\n\nCorrected prediction:\n"


def rewriting_prompt(prediction: Prediction) -> str | list[Message]:
    """Problem + correct solution + prediction, for training and for scoring alike.

    Of the same kind as the policy's prompt (text or one user message), so that the corrected
    prediction follows it as the response follows the policy's prompt.
    """
    text = REWRITING_PROMPT.format(
        problem=prediction.problem,
        solution=prediction.solution.strip(),
        response=prediction.response.strip(),
    )
    if isinstance(prediction.prompt, str):
        text += TEXT_ENDING
    return prediction.as_prompt(text)


def rewriting_rows(
    wrong: Sequence[Prediction],
    corrections: Sequence[str | None],
    right: Sequence[Prediction] = (),
) -> list[SFTRow]:
    """Training rows of the reward model (RLMEC, arXiv 2401.06081).

    Args:
        wrong: wrong predictions.
        corrections: one for each; a prediction without one (None) gives no row.
        right: right predictions, which are to be rewritten into themselves.
    """
    pairs = [(p, text) for p, text in zip(wrong, corrections, strict=True) if text is not None]
    pairs += [(p, p.response) for p in right]
    return [SFTRow(rewriting_prompt(p), p.as_response(text)) for p, text in pairs]
