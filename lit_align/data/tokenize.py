"""Typed rows → token ids, with the prompt's end found in token space.

Two promises. A special token that stands as text in the data never becomes the special token. And
the prompt is tokenised as it will be at generation time, so that the boundary is where the model
will meet it; where the tokenizer merges text across it, the response is tokenised on its own and
the sequence says so (`merged_boundary`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from transformers import PreTrainedTokenizerBase

from lit_align.batch import CHOSEN, REJECTED
from lit_align.chat_templates import render_chat
from lit_align.data.bad_rows import BadRowError
from lit_align.data.encoding import Segments, TextEncoder
from lit_align.data.schema import (
    Content,
    Message,
    PreferenceRow,
    Row,
    TokenizedRow,
    TokenizedSequence,
    UnlearningRow,
    is_messages,
    is_token_ids,
)
from lit_align.errors import DataError

Truncation: TypeAlias = Literal["keep_start", "keep_end", "error"]
SAME_TOKENS = "chosen and rejected have the same tokens, as far as they are kept"
TrainOn: TypeAlias = Literal["last", "all_assistant"]


@dataclasses.dataclass(frozen=True)
class _Ids:
    """A sequence before truncation; fields as in TokenizedSequence."""

    prompt: list[int]
    response: list[int]
    token_weights: list[float] | None = None
    merged_boundary: bool = False


def _tokens(sequence: TokenizedSequence) -> tuple[bytes, bytes]:
    return sequence.prompt_ids.tobytes(), sequence.response_ids.tobytes()


def tokenize_row(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    *,
    row_id: int = 0,
    max_length: int = 1024,
    truncation: Truncation = "keep_start",
    train_on: TrainOn = "last",
) -> TokenizedRow:
    """Tokenise one row; see `RowTokenizer`, which is faster for many."""
    return RowTokenizer(tokenizer, max_length, truncation, train_on)(row, row_id)


class RowTokenizer:
    """Turns typed rows into token ids.

    Text rows: the tokenizer's BOS (if it adds one), prompt and response as they are, EOS. Chat
    rows: the tokenizer's chat template; the response ends with the template's EOS, and white space
    that the template writes after that is left out. Token ids are taken as given.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 1024,
        truncation: Truncation = "keep_start",
        train_on: TrainOn = "last",
    ) -> None:
        """Settings of all rows.

        Args:
            tokenizer: chat rows need its chat template.
            max_length: most tokens of prompt and response together.
            truncation: cut the end (`keep_start`), the beginning (`keep_end`; without a prompt
                left, the first token kept is context), or call a longer row a bad one (`error`).
            train_on: the response alone (`last`), or every assistant turn of the prompt, too; the
                tokens in between then have weight 0 (`all_assistant`).

        Raises:
            DataError: a setting that cannot be.
        """
        if max_length < 2:
            raise DataError(f"max_length is {max_length}; a prompt and a response need 2")
        if truncation not in ("keep_start", "keep_end", "error"):
            raise DataError(f"truncation is {truncation!r}: keep_start | keep_end | error")
        if train_on not in ("last", "all_assistant"):
            raise DataError(f"train_on is {train_on!r}: last | all_assistant")
        self.tokenizer = tokenizer
        self.encoder = TextEncoder(tokenizer)
        self.max_length = max_length
        self.truncation = truncation
        self.train_on = train_on

    def __call__(self, row: Row, row_id: int = 0) -> TokenizedRow:
        """Tokenise one row.

        Raises:
            BadRowError: nothing to train on is left after truncation, the row is too long under
                `error`, ids outside the vocabulary, weights that do not fit the response, or
                messages that the chat template cannot render; a pair whose sequences are the same.
        """
        if isinstance(row, PreferenceRow):
            parts: list[tuple[Content, list[float] | None, int]] = [
                (row.chosen, row.chosen_token_weights, CHOSEN),
                (row.rejected, row.rejected_token_weights, REJECTED),
            ]
        else:
            forget = isinstance(row, UnlearningRow) and not row.retain
            parts = [(row.response, row.token_weights, REJECTED if forget else CHOSEN)]
        sequences = tuple(self._sequence(row.prompt, *part) for part in parts)
        if len({_tokens(sequence) for sequence in sequences}) < len(sequences):
            raise BadRowError(SAME_TOKENS, f"max_length {self.max_length}")
        return TokenizedRow(row_id, sequences)

    def _sequence(
        self, prompt: Content, response: Content, weights: list[float] | None, role: int
    ) -> TokenizedSequence:
        """Tokenise, put weights on, truncate."""
        if is_token_ids(prompt):
            ids = _Ids(self._given(prompt), self._given(response))
        elif is_messages(prompt):
            ids = self._chat(prompt, response)  # type: ignore[arg-type]
        else:
            ids = self._text(str(prompt), str(response))
        if weights is not None:
            if len(weights) != len(ids.response):
                detail = f"{len(weights)} weights, {len(ids.response)} response tokens"
                raise BadRowError("token_weights do not fit the response", detail)
            ids = dataclasses.replace(ids, token_weights=weights)
        return self._truncated(ids, role)

    def _given(self, ids: Any) -> list[int]:
        """Token ids from the data, checked against the vocabulary."""
        size = len(self.tokenizer)
        if wrong := [i for i in ids if not 0 <= i < size]:
            raise BadRowError("token id outside the vocabulary", f"{wrong[0]}, size {size}")
        return list(ids)

    def _text(self, prompt: str, response: str) -> _Ids:
        """Plain text, in which nothing is a special token."""
        (prompt_ids, response_ids), merged = self.encoder.encode(
            Segments([prompt, response], literal=True)
        )
        return _Ids(
            self.encoder.bos_ids + prompt_ids,
            [*response_ids, self.encoder.eos_id],
            merged_boundary=merged,
        )

    def _chat(self, prompt: list[Message], response: list[Message]) -> _Ids:
        """A conversation; the response is one message."""
        messages, stand_ins = self.encoder.shielded([*prompt, *response])
        turns = [len(prompt)]
        if self.train_on == "all_assistant":
            turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        texts = self._turn_texts(messages, turns)
        (prompt_ids, *segments), merged = self.encoder.encode(Segments(texts, stand_ins=stand_ins))
        ids: list[int] = []
        weights: list[float] = []
        for i, segment in enumerate(segments):
            targets = self.encoder.length_to_eos(segment) if i % 2 == 0 else 0
            if i == len(segments) - 1:  # what follows the last stop token is nobody's target
                segment = segment[:targets]
            ids += segment
            weights += [1.0] * targets + [0.0] * (len(segment) - targets)
        return _Ids(prompt_ids, ids, weights if 0.0 in weights else None, merged)

    def _turn_texts(self, messages: list[Message], turns: Sequence[int]) -> list[str]:
        """The rendered conversation, cut before and after each turn that is trained."""
        cuts = []
        for turn in turns:
            cuts.append(self._render(messages[:turn], add_generation_prompt=True))
            cuts.append(self._render(messages[: turn + 1], add_generation_prompt=False))
        text = cuts[-1]
        if any(not text.startswith(cut) for cut in cuts):
            raise BadRowError("the chat template renders the prompt differently before a response")
        return [text[a:b] for a, b in itertools.pairwise([0, *map(len, cuts)])]

    def _render(self, messages: list[Message], *, add_generation_prompt: bool) -> str:
        if self.tokenizer.chat_template is None:
            raise DataError(
                "chat rows need a tokenizer with a chat template; set chat_template "
                "(`transcript` suits base models)"
            )
        try:
            return render_chat(
                self.tokenizer, messages, add_generation_prompt=add_generation_prompt
            )
        except DataError as error:
            reason, _, detail = str(error).partition(": ")
            raise BadRowError(reason, detail) from error

    def _truncated(self, ids: _Ids, role: int) -> TokenizedSequence:
        """The sequence, cut to `max_length`."""
        if not ids.prompt:
            raise BadRowError("empty prompt")
        if not ids.response:
            raise BadRowError("no response")
        tokens, boundary, weights = ids.prompt + ids.response, len(ids.prompt), ids.token_weights
        excess = len(tokens) - self.max_length
        if excess > 0:
            if self.truncation == "error" or (
                self.truncation == "keep_start" and boundary >= self.max_length
            ):
                detail = f"{len(tokens)} tokens, {boundary} of them the prompt"
                raise BadRowError(f"longer than max_length {self.max_length}", detail)
            if self.truncation == "keep_start":
                tokens = tokens[: self.max_length]
                weights = weights and weights[: len(tokens) - boundary]
            else:
                tokens = tokens[excess:]
                boundary = max(1, boundary - excess)
                weights = weights and weights[boundary - len(tokens) :]
        return TokenizedSequence(
            prompt_ids=np.asarray(tokens[:boundary]),
            response_ids=np.asarray(tokens[boundary:]),
            token_weights=None if weights is None else np.asarray(weights),
            role=role,
            merged_boundary=ids.merged_boundary,
            truncated=excess > 0,
        )
