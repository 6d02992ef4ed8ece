"""A response of the policy, with what is needed to correct it and to reward its tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lit_align.data.schema import Content, Message, is_messages
from lit_align.errors import DataError


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One response to one prompt.

    Attributes:
        prompt: text or chat messages, as the policy was asked.
        response: the policy's text.
        solution: a right response: the gold solution, or the chosen response of a pair.
        row: the question's row, as data: checkers read it, and its column `correction`, if any.
    """

    prompt: str | list[Message]
    response: str
    solution: str
    row: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the prompt.

        Raises:
            DataError: it is token ids or empty: a rewriting prompt quotes text.
        """
        if not isinstance(self.prompt, str) and not is_messages(self.prompt):
            raise DataError("a prediction's prompt must be text or chat messages")

    @classmethod
    def from_row(cls, row: Mapping[str, Any], response: Any = None) -> Prediction:
        """A response to a pipeline's row (see `rows.load_rows`), by default its own.

        Args:
            row: with `prompt` and `target`, the right response.
            response: text or one assistant message; default the row's `response`.

        Raises:
            DataError: a response or target that is neither text nor messages.
        """
        response = row["response"] if response is None else response
        return cls(row["prompt"], _text(response), _text(row["target"]), row)

    @property
    def problem(self) -> str:
        """The prompt as plain text; the turns of a longer conversation with their speakers."""
        if isinstance(self.prompt, str):
            return self.prompt.strip()
        if len(self.prompt) == 1:
            return self.prompt[0]["content"].strip()
        turns = (f"{m['role'].capitalize()}: {m['content'].strip()}" for m in self.prompt)
        return "\n\n".join(turns)

    def as_prompt(self, text: str) -> str | list[Message]:
        """`text` as a prompt of the same kind as the policy's: text, or one user message."""
        if isinstance(self.prompt, str):
            return text
        return [{"role": "user", "content": text}]

    def as_response(self, text: str) -> Content:
        """`text` as a response to such a prompt: text, or one assistant message."""
        if isinstance(self.prompt, str):
            return text
        return [{"role": "assistant", "content": text}]

    def in_place(self, correction: str) -> str:
        """A correction that begins with the white space that the response begins with.

        In plain text a response often begins with a space; without it the correction's first token
        would be another one.
        """
        white = len(self.response) - len(self.response.lstrip())
        return self.response[:white] + correction.strip()


def _text(response: Any) -> str:
    """A response's text, whether it stands alone or in a message."""
    if is_messages(response):
        return response[-1]["content"]
    if not isinstance(response, str):
        raise DataError(f"a response must be text or a message: {str(response)[:80]}")
    return response
