"""Text → token ids, with special tokens in the data kept apart from the template's own."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lit_align.data.schema import Content, Message, is_messages, texts_in
from lit_align.errors import DataError

# Supplementary Private Use Area-A: stands in for special tokens while a template is rendered.
PRIVATE_USE = range(0xF0000, 0xFFFFE)


@dataclasses.dataclass(frozen=True)
class Segments:
    """A text in consecutive pieces.

    Attributes:
        texts: the pieces, as rendered.
        literal: the whole is data: no special token in it is meant as one.
        stand_ins: private-use character → the special token of the data that it stands for.
    """

    texts: Sequence[str]
    literal: bool = False
    stand_ins: dict[str, str] = dataclasses.field(default_factory=dict)


class TextEncoder:
    """A tokenizer with what is known about its special tokens.

    Attributes:
        tokenizer: the tokenizer.
        eos_id: its EOS token.
        bos_ids: what it puts before a plain text: its BOS, or nothing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no EOS token to end a response with")
        self.tokenizer = tokenizer
        self.eos_id: int = tokenizer.eos_token_id
        self.bos_ids = _bos_ids(tokenizer)
        self._special_ids = _special_ids(tokenizer)
        # Longest first: where one special token begins another, the longer one is meant.
        by_length = sorted(self._special_ids, key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, by_length)) + ")")

    def special_tokens_in(self, content: Content) -> list[str]:
        """The special tokens that stand as text in `content`."""
        if isinstance(content, str):
            return self._special.findall(content)
        if is_messages(content):
            return [s for m in content for s in self._found_in(m)]  # type: ignore[arg-type]
        return []

    def shielded(self, messages: Sequence[Message]) -> tuple[list[Message], dict[str, str]]:
        """Messages with every literal special token replaced by one private-use character.

        After rendering, the special tokens found are the template's own. Also returns what each
        character stands for.
        """
        found = sorted({special for message in messages for special in self._found_in(message)})
        if not found:
            return list(messages), {}
        text = "".join(message["content"] for message in messages)
        free = (chr(code) for code in PRIVATE_USE if chr(code) not in text)
        stand_ins = dict(zip(found, free, strict=False))
        shielded = [
            {**m, "content": self._special.sub(lambda s: stand_ins[s[0]], m["content"])}
            for m in messages
        ]
        return shielded, {character: special for special, character in stand_ins.items()}

    def encode(self, segments: Segments) -> tuple[list[list[int]], bool]:
        """Token ids of each segment, and whether tokens would have crossed a boundary.

        Where the ids of every beginning of the text are the beginning of the whole text's ids, the
        whole is simply cut there. Otherwise each segment is tokenised by itself, so that the first
        one has the ids it has at generation time.
        """
        whole = self._ids("".join(segments.texts), segments)
        places = [0]
        for end in range(1, len(segments.texts)):
            beginning = self._ids("".join(segments.texts[:end]), segments)
            if whole[: len(beginning)] != beginning:
                return [self._ids(text, segments) for text in segments.texts], True
            places.append(len(beginning))
        return [whole[a:b] for a, b in itertools.pairwise([*places, len(whole)])], False

    def length_to_eos(self, ids: list[int]) -> int:
        """How many ids belong to a response: those up to an EOS before white space, or all."""
        if self.eos_id not in ids:
            return len(ids)
        end = len(ids) - ids[::-1].index(self.eos_id)
        return len(ids) if str(self.tokenizer.decode(ids[end:])).strip() else end

    def _found_in(self, message: Message) -> list[str]:
        # Of every field: a template may show more than the content (a name, a chain of thought).
        return [s for text in texts_in(message) for s in self._special.findall(text)]

    def _ids(self, text: str, segments: Segments) -> list[int]:
        if not segments.stand_ins:
            return self._tokenize(text, literal=segments.literal)
        ids: list[int] = []
        restore = str.maketrans(segments.stand_ins)
        for i, piece in enumerate(self._special.split(text)):
            if i % 2:  # re.split with a group: every other piece is a separator
                ids.append(self._special_ids[piece])
            else:
                ids += self._tokenize(piece.translate(restore), literal=True)
        return ids

    def _tokenize(self, text: str, *, literal: bool) -> list[int]:
        return self.tokenizer(  # type: ignore[return-value]
            text, add_special_tokens=False, split_special_tokens=literal, verbose=False
        )["input_ids"]


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Text → id of every special token, the named ones and those added as special."""
    added = tokenizer.added_tokens_decoder.items()
    special = {token.content: index for index, token in added if token.special}
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return {**special, **dict(named)}


def _bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids = tokenizer("")["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []  # type: ignore[index]
