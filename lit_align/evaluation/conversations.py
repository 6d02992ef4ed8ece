"""Answers to questions of several turns: each turn sees the answers to those before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_align.errors import DataError
from lit_align.evaluation.generation import generate
from lit_align.evaluation.prompts import encode_prompt

Message = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Question:
    """What a model is asked.

    Attributes:
        key: names the question; its draws depend on it, not on its place or its batch.
        turns: what the user says, one text a turn; at least one.
        before: messages that come before the first turn: a system message, earlier turns.
    """

    key: str
    turns: tuple[str, ...]
    before: tuple[Message, ...] = ()

    def messages(self, answers: Sequence[str]) -> list[Message]:
        """The conversation up to the turn after `answers`."""
        messages = list(self.before)
        for turn, answer in zip(self.turns, answers, strict=False):
            messages.append({"role": "user", "content": turn})
            messages.append({"role": "assistant", "content": answer})
        return [*messages, {"role": "user", "content": self.turns[len(answers)]}]


def converse(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_choices: int = 1,
    batch_size: int = 16,
    seed: int = 0,
    stop: str | None = None,
    progress: bool = True,
) -> list[list[list[str]]]:
    """Conversations with a model, through its chat template.

    Args:
        model: any causal LM.
        tokenizer: with a chat template.
        questions: to answer.
        max_new_tokens: most tokens of one answer.
        temperature: 0 is greedy.
        top_p: nucleus.
        num_choices: independent conversations a question.
        batch_size: answers generated at a time.
        seed: of the draws.
        stop: a text that ends an answer; it and what follows are cut off.
        progress: show a bar for every turn.

    Returns:
        For each question, for each of its choices, the answers by turn, without white space around.

    Raises:
        DataError: a question that the chat template cannot render, or that is longer with its
            answers than the model's context.
    """
    check_lengths(model, tokenizer, questions, max_new_tokens)
    talks: list[tuple[Question, int, list[str]]] = [
        (question, choice, []) for question in questions for choice in range(num_choices)
    ]
    for turn in range(max((len(q.turns) for q in questions), default=0)):
        going = [talk for talk in talks if len(talk[0].turns) > turn]
        drawn = generate(
            model,
            tokenizer,
            [question.messages(answers) for question, _, answers in going],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            batch_size=batch_size,
            seed=seed,
            keys=[f"{question.key}/{choice}/{turn}" for question, choice, _ in going],
            progress=progress,
        )
        for (_, _, answers), (text,) in zip(going, drawn, strict=True):
            answers.append((text.partition(stop)[0] if stop else text).strip())
    answered = iter(answers for _, _, answers in talks)
    return [[next(answered) for _ in range(num_choices)] for _ in questions]


def check_lengths(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    max_new_tokens: int,
) -> None:
    """Make sure that every conversation fits into the context, however long its answers get.

    Raises:
        DataError: names the first that does not, and the way out.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for question in questions:
        asked = len(encode_prompt(tokenizer, question.messages([""] * (len(question.turns) - 1))))
        most = asked + max_new_tokens * len(question.turns)
        if longest is not None and most > longest:
            raise DataError(
                f"{question.key}: {asked} tokens of questions and {len(question.turns)} x "
                f"{max_new_tokens} of answers are more than the model's context of {longest}: "
                "lower max_new_tokens"
            )
