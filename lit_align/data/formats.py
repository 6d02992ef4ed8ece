"""Columns of a data file → typed rows. Which format a row has is seen from its columns.

`FORMATS` lists every format with its columns; `format: auto` takes the first one that fits each
row. Content may be text, chat messages, or token ids (columns that end in `_ids`), and
`token_weights` columns come along as they are.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

from lit_align.data.bad_rows import BadRowError
from lit_align.data.schema import (
    Content,
    Message,
    PreferenceRow,
    SFTRow,
    UnlearningRow,
    is_messages,
)
from lit_align.data.validate import IDENTICAL

Columns = Mapping[str, Any]

TURN = re.compile(r"\n\n(Human|Assistant):")
TRANSCRIPT_START = "\n\nHuman:"
TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclasses.dataclass(frozen=True)
class Format:
    """One way to write rows of one kind.

    Attributes:
        name: what the setting `format` calls it.
        matches: whether a row's columns look like it.
        parse: columns to a typed row; raises BadRowError.
    """

    name: str
    matches: Callable[[Columns], bool]
    parse: Callable[[Columns], Any]


def parse_row(columns: Columns, formats: tuple[Format, ...], name: str = "auto") -> Any:
    """The typed row in `columns`, read by the format of that name or the first that matches.

    Raises:
        BadRowError: no format matches, or the row's content is unusable.
    """
    for candidate in formats:
        if candidate.name == name or (name == "auto" and candidate.matches(columns)):
            try:
                return candidate.parse(columns)
            except KeyError as error:
                raise BadRowError(
                    f"a column is missing for format {candidate.name}", str(error)
                ) from error
    raise BadRowError("columns fit no known format", ", ".join(sorted(columns)))


def _has(*names: str) -> Callable[[Columns], bool]:
    return lambda columns: all(columns.get(name) is not None for name in names)


# --- preference pairs -----------------------------------------------------------------------


def _preference(columns: Columns) -> PreferenceRow:
    """prompt, chosen, rejected: text, or messages (a text prompt is then a user's message)."""
    prompt, chosen, rejected = columns["prompt"], columns["chosen"], columns["rejected"]
    if _whole_conversation(chosen) and _whole_conversation(rejected):
        return _implicit_prompt(columns)
    if any(isinstance(content, list) for content in (prompt, chosen, rejected)):
        prompt = _as_messages(prompt, "user")
        chosen = _as_messages(chosen, "assistant")
        rejected = _as_messages(rejected, "assistant")
    return _with_weights(columns, prompt, chosen, rejected)


def _whole_conversation(content: Any) -> bool:
    """Messages that begin with a prompt instead of the response."""
    return is_messages(content) and content[0].get("role") != "assistant"


def _implicit_prompt(columns: Columns) -> PreferenceRow:
    """chosen, rejected: the prompt is the beginning that both share."""
    chosen, rejected = columns["chosen"], columns["rejected"]
    if not isinstance(chosen, str | list) or type(chosen) is not type(rejected):
        raise BadRowError("chosen and rejected are neither two texts nor two lists of messages")
    if chosen == rejected:
        raise BadRowError(IDENTICAL)
    pairs = zip(chosen, rejected, strict=False)
    size = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    if isinstance(chosen, str) and chosen[:size].endswith(" "):
        size -= 1  # tokenizers want the space at the beginning of the next word
    return _with_weights(columns, chosen[:size], chosen[size:], rejected[size:])


def _transcript_pair(columns: Columns) -> PreferenceRow:
    """chosen, rejected: Anthropic transcripts, each turn after Human: or Assistant:."""
    chosen, rejected = parse_transcript(columns["chosen"]), parse_transcript(columns["rejected"])
    return _implicit_prompt({**columns, "chosen": chosen, "rejected": rejected})


def parse_transcript(text: Any) -> list[Message]:
    """Messages of an Anthropic transcript; white space around each is dropped."""
    before, *turns = TURN.split(text) if isinstance(text, str) else [""]
    if before.strip() or not turns:
        raise BadRowError("not a Human/Assistant transcript")
    return [
        {"role": TRANSCRIPT_ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(turns[::2], turns[1::2], strict=True)
    ]


def _preference_ids(columns: Columns) -> PreferenceRow:
    """prompt_ids, chosen_ids, rejected_ids: token ids."""
    return _with_weights(
        columns, columns["prompt_ids"], columns["chosen_ids"], columns["rejected_ids"]
    )


def _solution_pair(columns: Columns) -> PreferenceRow:
    """A question (or problem), its solution, and a wrong prediction, which is rejected."""
    if columns.get("is_correct"):
        raise BadRowError("the prediction is correct: no pair")
    return PreferenceRow(
        _as_messages(_question(columns), "user"),
        _as_messages(columns["solution"], "assistant"),
        _as_messages(columns["prediction"], "assistant"),
    )


def _with_weights(columns: Columns, prompt: Content, chosen: Any, rejected: Any) -> PreferenceRow:
    return PreferenceRow(
        prompt,
        chosen,
        rejected,
        columns.get("chosen_token_weights"),
        columns.get("rejected_token_weights"),
    )


def _is_transcript_pair(columns: Columns) -> bool:
    pair = columns.get("chosen"), columns.get("rejected")
    return all(isinstance(text, str) and text.startswith(TRANSCRIPT_START) for text in pair)


PREFERENCE_FORMATS = (
    Format("token_ids", _has("prompt_ids", "chosen_ids", "rejected_ids"), _preference_ids),
    Format("transcript", _is_transcript_pair, _transcript_pair),
    Format("preference", _has("prompt", "chosen", "rejected"), _preference),
    Format("implicit_prompt", _has("chosen", "rejected"), _implicit_prompt),
    Format("prediction", _has("solution", "prediction"), _solution_pair),
)

# --- one response -----------------------------------------------------------------------------


def _sft_messages(columns: Columns) -> SFTRow:
    """messages: a conversation that ends with the assistant."""
    messages = columns["messages"]
    if not isinstance(messages, list):
        raise BadRowError("messages is not a list", type(messages).__name__)
    return SFTRow(messages[:-1], messages[-1:], columns.get("token_weights"))


def _response(prompt_column: str, response_column: str) -> Callable[[Columns], SFTRow]:
    """A prompt and a response column, each text or messages."""

    def parse(columns: Columns) -> SFTRow:
        prompt, response = columns[prompt_column], columns[response_column]
        if isinstance(prompt, list) or isinstance(response, list):
            prompt, response = _as_messages(prompt, "user"), _as_messages(response, "assistant")
        return SFTRow(prompt, response, columns.get("token_weights"))

    return parse


def _response_ids(columns: Columns) -> SFTRow:
    """prompt_ids, response_ids: token ids."""
    return SFTRow(columns["prompt_ids"], columns["response_ids"], columns.get("token_weights"))


def _alpaca(columns: Columns) -> SFTRow:
    """instruction, output, and an input that may be empty: one user's message, one answer."""
    question, extra = columns["instruction"], columns.get("input")
    if isinstance(question, str) and isinstance(extra, str) and extra.strip():
        question = f"{question}\n\n{extra}"
    return SFTRow(
        _as_messages(question, "user"),
        _as_messages(columns["output"], "assistant"),
        columns.get("token_weights"),
    )


def _solution(columns: Columns) -> SFTRow:
    """Question (or problem), solution."""
    return SFTRow(
        _as_messages(_question(columns), "user"),
        _as_messages(columns["solution"], "assistant"),
        columns.get("token_weights"),
    )


SFT_FORMATS = (
    Format("token_ids", _has("prompt_ids", "response_ids"), _response_ids),
    Format("messages", _has("messages"), _sft_messages),
    Format("prompt_completion", _has("prompt", "completion"), _response("prompt", "completion")),
    Format("prompt_response", _has("prompt", "response"), _response("prompt", "response")),
    Format("alpaca", _has("instruction", "output"), _alpaca),
    Format("solution", _has("solution"), _solution),
    Format("input_output", _has("input", "output"), _response("input", "output")),
)

# --- unlearning ---------------------------------------------------------------------------------


def _unlearning(columns: Columns) -> UnlearningRow:
    """Any format of one response; `retain: true` marks a good response to be kept."""
    row = parse_row(columns, SFT_FORMATS)
    retain = columns.get("retain", False)
    if not isinstance(retain, bool):
        raise BadRowError("retain is neither true nor false", repr(retain))
    return UnlearningRow(row.prompt, row.response, row.token_weights, retain)


def _rewarded(columns: Columns) -> UnlearningRow:
    """input, output, reward: ALLO's forgetting rows, one weight a token of output and EOS."""
    return UnlearningRow(columns["input"], columns["output"], columns["reward"])


def _prediction(columns: Columns) -> UnlearningRow:
    """Question (or problem), prediction; correct ones (`is_correct`) are to be kept."""
    return UnlearningRow(
        _as_messages(_question(columns), "user"),
        _as_messages(columns["prediction"], "assistant"),
        columns.get("token_weights"),
        bool(columns.get("is_correct", False)),
    )


def _rejected(columns: Columns) -> UnlearningRow:
    """A preference pair in any format: the rejected response is to be forgotten."""
    pair = parse_row(columns, PREFERENCE_FORMATS)
    return UnlearningRow(pair.prompt, pair.rejected, pair.rejected_token_weights)


UNLEARNING_FORMATS = (
    Format("rewarded", _has("input", "output", "reward"), _rewarded),
    Format("prediction", _has("prediction"), _prediction),
    Format("rejected", _has("rejected"), _rejected),
    Format("rejected_ids", _has("rejected_ids"), _rejected),
    Format("response", lambda columns: True, _unlearning),
)

FORMATS: dict[type, tuple[Format, ...]] = {
    PreferenceRow: PREFERENCE_FORMATS,
    SFTRow: SFT_FORMATS,
    UnlearningRow: UNLEARNING_FORMATS,
}


def _question(columns: Columns) -> Any:
    return columns["question"] if "question" in columns else columns["problem"]


def _as_messages(content: Any, role: str) -> Any:
    """Text as one message of that role; messages as they are."""
    return [{"role": role, "content": content}] if isinstance(content, str) else content
