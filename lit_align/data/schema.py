"""The rows of the three objectives, before and after tokenising."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

Message: TypeAlias = dict[str, str]
# Plain text, chat messages, or token ids taken as they are.
Content: TypeAlias = str | list[Message] | list[int]


@dataclasses.dataclass(frozen=True)
class PreferenceRow:
    """A prompt with a better and a worse response.

    All three are of one kind: text, messages (the responses one assistant message each) or token
    ids. Token weights count response tokens after tokenising, the final stop token included.
    """

    prompt: Content
    chosen: Content
    rejected: Content
    chosen_token_weights: list[float] | None = None
    rejected_token_weights: list[float] | None = None


@dataclasses.dataclass(frozen=True)
class SFTRow:
    """A prompt and the response to be learned; kinds and weights as in `PreferenceRow`."""

    prompt: Content
    response: Content
    token_weights: list[float] | None = None


@dataclasses.dataclass(frozen=True)
class UnlearningRow:
    """A response to be forgotten, or, with `retain`, a good one to be kept."""

    prompt: Content
    response: Content
    token_weights: list[float] | None = None
    retain: bool = False


Row: TypeAlias = PreferenceRow | SFTRow | UnlearningRow


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedSequence:
    """One prompt with one response.

    Attributes:
        prompt_ids: (P,) int32, P >= 1: the last one's hidden state predicts the first target.
        response_ids: (N,) int32, N >= 1, the targets.
        token_weights: (N,) fp32; None stands for ones.
        role: CHOSEN or REJECTED, as in `PackedBatch`.
        merged_boundary: the tokenizer would have merged text across the prompt's end.
        truncated: tokens were cut off to fit `max_length`.
        ref_per_token_logps: (N,) fp32 log-probs of the reference policy, where known.
    """

    prompt_ids: np.ndarray
    response_ids: np.ndarray
    token_weights: np.ndarray | None
    role: int
    merged_boundary: bool = False
    truncated: bool = False
    ref_per_token_logps: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name, dtype in (
            ("prompt_ids", np.int32),
            ("response_ids", np.int32),
            ("token_weights", np.float32),
            ("ref_per_token_logps", np.float32),
        ):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, np.asarray(value, dtype))

    @property
    def num_tokens(self) -> int:
        """P + N."""
        return len(self.prompt_ids) + len(self.response_ids)


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedRow:
    """The sequences of one row: (chosen, rejected) of a pair, else a single one.

    Attributes:
        row_id: position of the row in its split; -1 marks a filler row, which every loss and
            metric ignores (see `sampler`).
        sequences: one or two.
    """

    row_id: int
    sequences: tuple[TokenizedSequence, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the longest sequence: what the row costs in a padded batch."""
        return max(sequence.num_tokens for sequence in self.sequences)


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a value of JSON, keys of objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, each in value.items():
            yield str(name)
            yield from texts_in(each)
    elif isinstance(value, list):
        for each in value:
            yield from texts_in(each)


def is_messages(content: Any) -> bool:
    """Whether `content` is a list of chat messages."""
    return isinstance(content, list) and bool(content) and isinstance(content[0], dict)


def is_token_ids(content: Any) -> bool:
    """Whether `content` is a list of token ids."""
    return (
        isinstance(content, Sequence) and not isinstance(content, str) and not is_messages(content)
    )
