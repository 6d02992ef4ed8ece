"""Typed rows → token ids, with the prompt's end found in token space.

Two promises. A special token that stands as text in the data never becomes the special token. And
the prompt is tokenised as it will be at generation time, so that the boundary is where the model
will meet it; where the tokenizer merges text across it, the response is tokenised on its own and
the sequence says so (`merged_boundary`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from transformers import PreTrainedTokenizerBase

from lit_align.data.bad_rows import BadRowError
from lit_align.data.batch import CHOSEN, REJECTED
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
TrainOn: TypeAlias = Literal["last", "all_assistant"]

# Supplementary Private Use Area-A: stands in for special tokens while a template is rendered.
PRIVATE_USE = range(0xF0000, 0xFFFFE)


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


@dataclasses.dataclass(frozen=True)
class RowTokenizer:
    """Turns typed rows into token ids.

    Text rows: the tokenizer's BOS (if it adds one), prompt and response as they are, EOS. Chat
    rows: the tokenizer's chat template; the response ends with the template's EOS, and white space
    that the template writes after that is left out. Token ids are taken as given.

    Attributes:
        tokenizer: chat rows need its chat template.
        max_length: most tokens of prompt and response together.
        truncation: cut the end (`keep_start`), the beginning (`keep_end`; without a prompt left,
            the first token kept is context), or treat a longer row as a bad one (`error`).
        train_on: the response alone (`last`), or every assistant turn of the prompt, too: the
            tokens in between then have weight 0 (`all_assistant`).
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int = 1024
    truncation: Truncation = "keep_start"
    train_on: TrainOn = "last"

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise DataError(f"max_length is {self.max_length}; a prompt and a response need 2")
        if self.truncation not in ("keep_start", "keep_end", "error"):
            raise DataError(f"truncation is {self.truncation!r}: keep_start | keep_end | error")
        if self.tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no EOS token to end a response with")
        object.__setattr__(self, "special_ids", _special_ids(self.tokenizer))
        # Longest first: where one special token begins another, the longer one is meant.
        alternatives = sorted(self.special_ids, key=len, reverse=True)
        pattern = re.compile("(" + "|".join(map(re.escape, alternatives)) + ")")
        object.__setattr__(self, "special_pattern", pattern)
        object.__setattr__(self, "bos_ids", _bos_ids(self.tokenizer))

    special_ids: dict[str, int] = dataclasses.field(init=False)
    special_pattern: re.Pattern[str] = dataclasses.field(init=False)
    bos_ids: list[int] = dataclasses.field(init=False)

    def __call__(self, row: Row, row_id: int = 0) -> TokenizedRow:
        """Tokenise one row.

        Raises:
            BadRowError: nothing to train on is left after truncation, the row is too long under
                `error`, ids outside the vocabulary, weights that do not fit the response, or a
                template that renders the prompt differently once a response follows.
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
        return TokenizedRow(row_id, sequences)

    def literal_special_tokens(self, content: Content) -> list[str]:
        """The special tokens that stand as text in `content`."""
        if is_messages(content):
            return [s for m in content for s in self.special_pattern.findall(m["content"])]  # type: ignore[index,call-overload]
        return self.special_pattern.findall(content) if isinstance(content, str) else []

    def _sequence(
        self, prompt: Content, response: Content, weights: list[float] | None, role: int
    ) -> TokenizedSequence:
        """Tokenise, apply weights, truncate."""
        merged = False
        turn_weights: list[float] | None = None
        if is_token_ids(prompt):
            prompt_ids, response_ids = self._given(prompt), self._given(response)
        elif is_messages(prompt):
            prompt_ids, response_ids, turn_weights, merged = self._chat(prompt, response)
        else:
            prompt_ids, response_ids, merged = self._text(str(prompt), str(response))
        if weights is None:
            weights = turn_weights
        elif len(weights) != len(response_ids):
            detail = f"{len(weights)} weights for {len(response_ids)} response tokens"
            raise BadRowError("token_weights do not fit the response", detail)
        return self._truncated(prompt_ids, response_ids, weights, role, merged)

    def _given(self, ids: Any) -> list[int]:
        """Token ids from the data, checked against the vocabulary."""
        size = len(self.tokenizer)
        if wrong := [i for i in ids if not 0 <= i < size]:
            raise BadRowError("token id outside the vocabulary", f"{wrong[0]}, size {size}")
        return list(ids)

    def _text(self, prompt: str, response: str) -> tuple[list[int], list[int], bool]:
        """Plain text, in which nothing is a special token."""
        (prompt_ids, response_ids), merged = self._segments([prompt, response], split_special=True)
        return self.bos_ids + prompt_ids, [*response_ids, self._eos], merged

    def _chat(
        self, prompt: Any, response: Any
    ) -> tuple[list[int], list[int], list[float] | None, bool]:
        """(prompt ids, response ids, weights, merged) of a conversation."""
        messages, stand_ins = self._shielded([*prompt, *response])
        turns = [len(prompt)]
        if self.train_on == "all_assistant":
            turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        segments = self._turn_segments(messages, turns)
        encoded, merged = self._segments(segments, stand_ins=stand_ins)
        response_ids: list[int] = []
        weights: list[float] = []
        for i, ids in enumerate(encoded[1:]):
            is_response = i % 2 == 0
            end = self._end_of_turn(ids) if is_response else 0
            if i == len(encoded) - 2:  # white space after the last stop token is nobody's target
                ids = ids[:end]
            response_ids += ids
            weights += [1.0] * end + [0.0] * (len(ids) - end)
        return encoded[0], response_ids, weights if 0.0 in weights else None, merged

    def _shielded(self, messages: list[Message]) -> tuple[list[Message], dict[str, str]]:
        """Messages with every literal special token replaced by one private-use character.

        Also returns what each character stands for, to be put back after the template's own special
        tokens have been recognised.
        """
        found = sorted({s for m in messages for s in self.special_pattern.findall(m["content"])})
        if not found:
            return messages, {}
        text = "".join(message["content"] for message in messages)
        free = (chr(code) for code in PRIVATE_USE if chr(code) not in text)
        stand_ins = dict(zip(found, free, strict=False))
        shielded = [
            {**m, "content": self.special_pattern.sub(lambda s: stand_ins[s[0]], m["content"])}
            for m in messages
        ]
        return shielded, {character: special for special, character in stand_ins.items()}

    def _turn_segments(self, messages: list[Message], turns: Sequence[int]) -> list[str]:
        """The rendered conversation in pieces: what precedes a trained turn, the turn, and so on."""
        end = turns[-1] + 1
        cuts = []
        for turn in turns:
            cuts.append(self._render(messages[:turn], add_generation_prompt=True))
            cuts.append(self._render(messages[: turn + 1], add_generation_prompt=False))
        text = self._render(messages[:end], add_generation_prompt=False)
        if any(not text.startswith(cut) for cut in cuts):
            raise BadRowError("the chat template renders the prompt differently before a response")
        places = [0, *map(len, cuts)]
        return [text[a:b] for a, b in zip(places, places[1:], strict=False)]

    def _render(self, messages: list[Message], *, add_generation_prompt: bool) -> str:
        if self.tokenizer.chat_template is None:
            raise DataError("chat rows need a tokenizer with a chat template; set chat_template")
        return self.tokenizer.apply_chat_template(  # type: ignore[return-value]
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _segments(
        self, segments: Sequence[str], *, split_special: bool = False, stand_ins: Any = None
    ) -> tuple[list[list[int]], bool]:
        """Token ids of consecutive segments of a text, and whether tokens crossed a boundary.

        Where the ids of every beginning of the text are the beginning of the whole text's ids, the
        whole is simply cut there. Otherwise the first segment keeps the ids it has by itself, and
        each later one is tokenised alone.
        """
        options: dict[str, Any] = {"split_special": split_special, "stand_ins": stand_ins}
        whole = self._encode("".join(segments), **options)
        places = [0]
        for end in range(1, len(segments)):
            beginning = self._encode("".join(segments[:end]), **options)
            if whole[: len(beginning)] != beginning:
                return [self._encode(segment, **options) for segment in segments], True
            places.append(len(beginning))
        return [whole[a:b] for a, b in zip(places, [*places[1:], None], strict=True)], False

    def _encode(self, text: str, *, split_special: bool, stand_ins: Any) -> list[int]:
        """Token ids of a text; with `stand_ins`, its own special tokens are told from the data's."""
        if not stand_ins:
            return self._ids(text, split_special)
        ids: list[int] = []
        restore = str.maketrans(stand_ins)
        for i, piece in enumerate(self.special_pattern.split(text)):
            is_special = i % 2 == 1
            ids += (
                [self.special_ids[piece]]
                if is_special
                else self._ids(piece.translate(restore), True)
            )
        return ids

    def _ids(self, text: str, split_special: bool) -> list[int]:
        return self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=split_special, verbose=False
        )["input_ids"]  # type: ignore[return-value]

    @property
    def _eos(self) -> int:
        return self.tokenizer.eos_token_id  # type: ignore[return-value]

    def _end_of_turn(self, ids: list[int]) -> int:
        """How many ids belong to the response: all, or those up to an EOS before white space."""
        if self._eos not in ids:
            return len(ids)
        end = len(ids) - ids[::-1].index(self._eos)
        return len(ids) if self.tokenizer.decode(ids[end:]).strip() else end

    def _truncated(
        self,
        prompt_ids: list[int],
        response_ids: list[int],
        weights: list[float] | None,
        role: int,
        merged: bool,
    ) -> TokenizedSequence:
        """The sequence, cut to `max_length`."""
        if not prompt_ids:
            raise BadRowError("empty prompt")
        if not response_ids:
            raise BadRowError("no response")
        ids = prompt_ids + response_ids
        too_long = len(ids) > self.max_length
        boundary = len(prompt_ids)
        if too_long:
            if self.truncation == "error" or (
                self.truncation == "keep_start" and boundary >= self.max_length
            ):
                detail = f"{len(ids)} tokens, {boundary} of them the prompt, max {self.max_length}"
                raise BadRowError("longer than max_length", detail)
            if self.truncation == "keep_start":
                ids = ids[: self.max_length]
            else:
                ids = ids[-self.max_length :]
                boundary = max(1, self.max_length - len(response_ids))
        targets = len(ids) - boundary
        if weights is not None:
            keep_start = self.truncation == "keep_start"
            weights = weights[:targets] if keep_start else weights[len(weights) - targets :]
        return TokenizedSequence(
            prompt_ids=np.asarray(ids[:boundary]),
            response_ids=np.asarray(ids[boundary:]),
            token_weights=None if weights is None else np.asarray(weights),
            role=role,
            merged_boundary=merged,
            truncated=too_long,
        )


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Text → id of every special token, the named ones and those added as special."""
    added = tokenizer.added_tokens_decoder.items()
    special = {token.content: index for index, token in added if token.special}
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return {**special, **dict(named)}


def _bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a plain text: its BOS, or nothing."""
    ids = tokenizer("")["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []  # type: ignore[index]
