"""How a row becomes a prompt and a target: the same for training, sampling and evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from lit_align.chat_templates import render_chat
from lit_align.errors import DataError

# Text, chat messages ({role, content}), or token ids.
Prompt: TypeAlias = str | Sequence[Mapping[str, str]] | Sequence[int]

ANSWER_MARK = "The answer is:"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
RATIONALE_WORDS = 40


def question_prompt(row: Mapping[str, Any]) -> list[dict[str, str]] | Prompt:
    """The prompt of a row: its own `prompt`, or its `question` as one user message.

    A question with `choices` lists them by letter, and its last line names the form of the answer.
    A word problem stands alone: on the default model such a line only suppresses the calculation
    (last number right in 7 of 96 problems without it, in 2 with it); training teaches the form.

    Raises:
        DataError: The row has neither `prompt` nor `question`, or more choices than letters.
    """
    if "prompt" in row:
        return row["prompt"]
    if not isinstance(row.get("question"), str):
        raise DataError(f"row {row.get('id')!r} has neither `prompt` nor `question`")
    lines = [row["question"].strip()]
    if choices := row.get("choices"):
        if len(choices) > len(LETTERS):
            raise DataError(f"row {row.get('id')!r} has {len(choices)} choices, at most 26")
        lines += [f"{x}. {choice}" for x, choice in zip(LETTERS, choices, strict=False)]
        lines.append(f'End with "{ANSWER_MARK} ..."')
    return [{"role": "user", "content": "\n".join(lines)}]


def target_response(row: Mapping[str, Any]) -> str:
    """The right response to `question_prompt(row)`, ending with the answer.

    A word problem's `solution` as it is, with the answer's line where it lacks one; a choice
    question's `rationale` (its first 40 words at most, on one line), then the right choice.

    Raises:
        DataError: The row has no answer.
    """
    if choices := row.get("choices"):
        rationale = " ".join(str(row.get("rationale") or "").split()[:RATIONALE_WORDS])
        return f"{rationale} {ANSWER_MARK} {choices[row['answer_index']]}".strip()
    if row.get("final_answer") is None:
        raise DataError(f"row {row.get('id')!r} has neither `choices` nor `final_answer`")
    solution = str(row.get("solution") or "").strip()
    if ANSWER_MARK in solution:
        return solution
    return f"{solution} {ANSWER_MARK} {row['final_answer']}".strip()


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt: messages through the chat template, up to where the answer begins.

    Raises:
        DataError: The prompt is empty, or a special token stands as text in it; chat messages for
            a tokenizer without a chat template, or with one that refuses them; what is neither
            text nor messages nor token ids of the vocabulary.
    """
    if isinstance(prompt, str):
        _refuse_special_tokens(tokenizer, prompt)
        ids = tokenizer(prompt)["input_ids"]
        # Some tokenizers end every text with EOS; a prompt must not end there.
        ids = ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
    elif prompt and isinstance(prompt[0], Mapping):
        messages: Any = list(prompt)
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
                raise DataError(f"a prompt holds what is no message: {message!r:.80}")
            _refuse_special_tokens(tokenizer, message["content"])
        if tokenizer.chat_template is None:
            raise DataError("a prompt of chat messages needs a tokenizer with a chat template")
        text = render_chat(tokenizer, messages, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = [_known_id(tokenizer, token) for token in prompt]
    if not ids:
        raise DataError("a prompt is empty")
    return ids


def _known_id(tokenizer: PreTrainedTokenizerBase, token: Any) -> int:
    is_id = isinstance(token, Integral) and not isinstance(token, bool)
    if not is_id or not 0 <= token < len(tokenizer):
        raise DataError(f"a prompt holds {token!r:.80}, which is no token id of the vocabulary")
    return int(token)


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str) -> list[int]:
    """Token ids of a response, in which nothing is a special token and nothing is added."""
    options: Any = {"add_special_tokens": False, "split_special_tokens": True}
    return list(tokenizer(response, **options)["input_ids"])


def _refuse_special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    for token in tokenizer.all_special_tokens:
        if token in text:
            raise DataError(f"a prompt holds the special token {token} as text: {text[:80]!r}")
