"""Rows of a benchmark as questions: MT-Bench's, AlpacaEval's, and plain prompts."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_align.data import BadRowError, BadRows, RowTokenizer, SFTRow
from lit_align.data.files import read_rows
from lit_align.data.schema import is_messages
from lit_align.data.validate import FIRST_ROLES, check_row
from lit_align.errors import DataError
from lit_align.evaluation.conversations import Question
from lit_align.evaluation.prompts import question_prompt
from lit_align.pipelines.rewards.predictions import Prediction


@dataclasses.dataclass(frozen=True)
class AskedQuestion:
    """A question, and what answer files say of it.

    Attributes:
        question: what the model is asked.
        question_id: MT-Bench's number.
        instruction: AlpacaEval's text.
        dataset: where it is from.
        category: MT-Bench's, or none.
    """

    question: Question
    question_id: int | str
    instruction: str
    dataset: str
    category: str | None


def read_questions(source: str, tokenizer: PreTrainedTokenizerBase) -> list[AskedQuestion]:
    """The questions of a data file, in order.

    A row has `turns` (MT-Bench), `instruction` with or without `input` (AlpacaEval), `prompt` (text
    or messages), or `question` with or without `choices`. Its `question_id`, or the number that its
    `id` ends with, is kept where these differ for all rows; otherwise questions are numbered.

    Raises:
        DataError: rows that cannot be asked, all named together; or none at all.
    """
    tokenize = RowTokenizer(tokenizer, sys.maxsize)
    bad_rows = BadRows()
    found: list[tuple[int, Mapping[str, Any], Question]] = []
    for line, columns in read_rows(source, bad_rows):
        try:
            question = _question(columns, str(line))
            _check(question, tokenize)
        except BadRowError as error:
            bad_rows.add(source, line, error, columns)
        else:
            found.append((line, columns, question))
    bad_rows.raise_if_any(can_skip=False)
    if not found:
        raise DataError(f"{source} holds no question")
    ids = _question_ids([columns for _, columns, _ in found])
    dataset = Path(source.partition(":")[0]).stem
    return [
        AskedQuestion(
            dataclasses.replace(question, key=str(question_id)),
            question_id,
            _instruction(question),
            str(columns.get("dataset") or dataset),
            columns.get("category"),
        )
        for (_, columns, question), question_id in zip(found, ids, strict=True)
    ]


def _question(columns: Mapping[str, Any], key: str) -> Question:
    if columns.get("turns") is not None:
        turns = columns["turns"]
        if not isinstance(turns, list) or not turns or not all(isinstance(t, str) for t in turns):
            raise BadRowError("turns is not a list of texts")
        return Question(key, tuple(turns))
    if columns.get("instruction") is not None:
        return Question(key, (_alpaca(columns),))
    if columns.get("prompt") is None and columns.get("question") is None:
        raise BadRowError("neither `turns`, `instruction`, `prompt` nor `question`")
    try:
        prompt: Any = question_prompt({k: v for k, v in columns.items() if v is not None})
    except DataError as error:
        raise BadRowError("not a question", str(error)) from error
    if isinstance(prompt, str):
        return Question(key, (prompt,))
    if not is_messages(prompt) or not isinstance(prompt[-1].get("content"), str):
        raise BadRowError("prompt is neither text nor messages")
    if prompt[-1].get("role") != "user":
        raise BadRowError("roles out of order", "the last message of a prompt is the user's")
    return Question(key, (prompt[-1]["content"],), tuple(prompt[:-1]))


def _alpaca(columns: Mapping[str, Any]) -> str:
    parts = columns["instruction"], columns.get("input") or ""
    if not all(isinstance(part, str) for part in parts):
        raise BadRowError("instruction or input is not text")
    return "\n\n".join(part for part in parts if part.strip())


def _check(question: Question, tokenize: RowTokenizer) -> None:
    """Refuse what training would refuse: damaged text, roles out of order, special tokens."""
    for turn in question.turns:
        messages = [*question.before, {"role": "user", "content": turn}]
        check_row(SFTRow(messages, [{"role": "assistant", "content": "-"}]))
        if special := tokenize.encoder.special_tokens_in(messages):
            raise BadRowError("special token as text", special[0])


def _question_ids(rows: list[Mapping[str, Any]]) -> list[int | str]:
    """The rows' own numbers where they tell all rows apart."""
    ids: list[int | str] = []
    for number, row in enumerate(rows, 1):
        given = row.get("question_id")
        ends = re.search(r"\d+$", str(row.get("id", "")))
        ids.append(given if isinstance(given, int | str) else int(ends[0]) if ends else number)
    return ids if len(set(map(str, ids))) == len(ids) else list(range(1, len(rows) + 1))


def _instruction(question: Question) -> str:
    """The text that AlpacaEval's judge reads: the question, with what was said before it."""
    before = [m for m in question.before if m["role"] not in FIRST_ROLES]
    asked = {"role": "user", "content": question.turns[0]}
    return Prediction([*before, asked], "", "").problem if before else question.turns[0]
