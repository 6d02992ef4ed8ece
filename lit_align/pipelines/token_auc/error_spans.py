"""Responses in which people marked what is wrong: character spans, and the tokens that they hit."""

from __future__ import annotations

import collections
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lit_align.chat_templates import render_chat
from lit_align.data import BadRowError, BadRows, RowTokenizer, TokenizedSequence, UnlearningRow
from lit_align.data.files import read_rows
from lit_align.data.validate import check_row
from lit_align.errors import ModelError
from lit_align.pipelines.rewards.predictions import Prediction

Span = tuple[int, int]

NO_SPANS = "no token in an error span"
NO_CORRECTION = "no correction"
ALL_WRONG = "every token in an error span"
NO_OFFSETS = "tokens whose characters are not known"


@dataclasses.dataclass(frozen=True)
class SpannedPrediction:
    """A wrong prediction with the spans that a person marked in it.

    Attributes:
        prediction: question, response and gold solution.
        correction: a person's right version of it, or None.
        spans: [start, end) of wrong characters of the response; none: it is right.
    """

    prediction: Prediction
    correction: str | None
    spans: tuple[Span, ...]

    @property
    def row_id(self) -> Any:
        """Of the row in its file."""
        return self.prediction.row["id"]


@dataclasses.dataclass(frozen=True)
class LabelledTokens:
    """A prediction's tokens as the policy would be trained on them.

    Attributes:
        source: the prediction.
        sequence: prompt and response tokens, the response's last one being EOS.
        wrong: (N - 1,) bool, whether a token is in an error span; EOS has no characters.
    """

    source: SpannedPrediction
    sequence: TokenizedSequence
    wrong: np.ndarray


def read_spanned(file: str) -> list[SpannedPrediction]:
    """The rows of a file with `question`, `gold`, `predictions`, `errors` and `corrected`.

    The spans are of the first prediction, as in QA-Feedback (Wu et al., arXiv 2306.01693).

    Raises:
        DataError: bad rows, all named together.
    """
    bad_rows, rows = BadRows(), []
    for number, columns in read_rows(file, bad_rows):
        try:
            rows.append(_spanned(columns, number))
        except BadRowError as error:
            bad_rows.add(file, number, error, columns)
    bad_rows.raise_if_any(can_skip=False)
    return rows


def _spanned(columns: Mapping[str, Any], number: int) -> SpannedPrediction:
    predictions = columns.get("predictions")
    if not isinstance(predictions, list) or not predictions:
        raise BadRowError("predictions is not a list of texts")
    texts = {"question": columns.get("question"), "gold": columns.get("gold")}
    for name, text in (texts | {"prediction": predictions[0]}).items():
        if not isinstance(text, str) or not text.strip():
            raise BadRowError(f"{name} is not text")
    prompt = [{"role": "user", "content": str(texts["question"])}]
    row = {"id": columns.get("id", number)}
    prediction = Prediction(prompt, predictions[0], str(texts["gold"]), row)
    check_row(UnlearningRow(prompt, prediction.as_response(prediction.response)))
    corrected = columns.get("corrected")
    if corrected is not None and not isinstance(corrected, str):
        raise BadRowError("corrected is not text")
    spans = _spans(columns.get("errors"), len(prediction.response))
    usable = corrected is not None and bool(corrected.strip())
    return SpannedPrediction(prediction, prediction.in_place(corrected) if usable else None, spans)  # type: ignore[arg-type]


def _spans(errors: Any, length: int) -> tuple[Span, ...]:
    spans = []
    for error in errors if isinstance(errors, list) else [errors]:
        try:
            start, end = error["start"], error["end"]
        except (TypeError, KeyError) as reason:
            raise BadRowError("errors is not a list of spans") from reason
        if type(start) is not int or type(end) is not int or not 0 <= start < end <= length:
            raise BadRowError("an error span outside the prediction", f"{start}:{end} of {length}")
        spans.append((start, end))
    return tuple(spans)


def labelled_tokens(
    rows: Sequence[SpannedPrediction], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[LabelledTokens], collections.Counter[str]]:
    """The rows that have right and wrong tokens and a correction, and how many lack what.

    Raises:
        ModelError: the tokenizer does not say which characters its tokens are made of.
    """
    if not tokenizer.is_fast:
        raise ModelError("error spans need a tokenizer with offsets: one of the tokenizers library")
    tokenize = RowTokenizer(tokenizer, sys.maxsize)
    kept: list[LabelledTokens] = []
    excluded: collections.Counter[str] = collections.Counter()
    for row in rows:
        found = _labelled(row, tokenize)
        if isinstance(found, str):
            excluded[found] += 1
        else:
            kept.append(found)
    return kept, excluded


def _labelled(row: SpannedPrediction, tokenize: RowTokenizer) -> LabelledTokens | str:
    """The row's tokens, or why it cannot be used."""
    prediction = row.prediction
    if not row.spans:
        return NO_SPANS
    if row.correction is None:
        return NO_CORRECTION
    if tokenize.encoder.special_tokens_in(prediction.problem + prediction.response):
        return "special token as text"
    response = prediction.as_response(prediction.response)
    sequence = tokenize(UnlearningRow(prediction.prompt, response)).sequences[0]
    offsets = response_offsets(prediction, sequence, tokenize.tokenizer)
    if offsets is None:
        return NO_OFFSETS
    wrong = tokens_in_spans(prediction.response, offsets, row.spans)
    if not wrong.any():
        return NO_SPANS
    return ALL_WRONG if wrong.all() else LabelledTokens(row, sequence, wrong)


def tokens_in_spans(text: str, offsets: Sequence[Span], spans: Sequence[Span]) -> np.ndarray:
    """(N,) bool: which tokens share a character with a span, white space around words apart.

    By hand, "ab cd" in tokens "ab", " c", "d" with the span 3:4 ("c"): only the second; with the
    span 2:3 (the space): none.
    """
    hit = np.zeros(len(text), bool)
    for start, end in spans:
        hit[start:end] = True
    wrong = np.zeros(len(offsets), bool)
    for i, (start, end) in enumerate(offsets):
        if piece := text[start:end].strip():
            start = text.index(piece, start)
            end = start + len(piece)
        wrong[i] = hit[start:end].any()
    return wrong


def response_offsets(
    prediction: Prediction, sequence: TokenizedSequence, tokenizer: PreTrainedTokenizerBase
) -> list[Span] | None:
    """[start, end) in the response of each of its tokens but EOS; None where they cannot be told.

    The conversation is tokenised once more with offsets, as a whole, or, where the tokenizer merges
    text across the prompt's end, from there on; its ids have to be the sequence's.
    """
    turns: Any = [*prediction.prompt, *prediction.as_response(prediction.response)]  # type: ignore[misc]
    text = render_chat(tokenizer, turns, add_generation_prompt=False)
    prompt = render_chat(tokenizer, turns[:-1], add_generation_prompt=True)
    response = prediction.response
    start = text.find(response, len(prompt)) if text.startswith(prompt) else text.rfind(response)
    before = len(prompt) if sequence.merged_boundary else 0
    if start < before:
        return None  # the template changes the response
    encoded = tokenizer(
        text[before:], add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    response_ids = sequence.response_ids.tolist()
    first = 0 if sequence.merged_boundary else len(sequence.prompt_ids)
    if ids[first : first + len(response_ids)] != response_ids:
        return None
    length, shift = len(response), before - start
    spans = [
        (min(max(a + shift, 0), length), min(max(b + shift, 0), length))
        for a, b in offsets[first : first + len(response_ids) - 1]
    ]
    return spans if all(a <= b for a, b in spans) else None
