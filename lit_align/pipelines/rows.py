"""The rows that a pipeline works on: read, split, prompted, judged, written."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lit_align.data import RowTokenizer
from lit_align.data.bad_rows import BadRowError, BadRows
from lit_align.data.files import read_rows
from lit_align.data.formats import FORMATS, parse_row
from lit_align.data.schema import PreferenceRow, SFTRow, TokenizedRow, is_messages
from lit_align.data.validate import check_row, check_text
from lit_align.errors import DataError, PipelineError
from lit_align.evaluation import (
    extract_choice,
    extract_final_answer,
    is_number,
    normalise_number,
    question_prompt,
    target_response,
)
from lit_align.files import write_atomically
from lit_align.pipelines.settings import DataKind, DataSettings
from lit_align.pipelines.word_problems import word_problems
from lit_align.strict_json import check_form, read_json_file

Row = dict[str, Any]

# Forms of what stages write and other stages read.
NUMBER = (int, float)
NUMBER_OR_NONE = (int, float, type(None))
CONTENT = (str, list)  # text, or messages
QUESTION = {"id": str, "prompt": CONTENT, "target": CONTENT}
PAIR = {"id": str, "prompt": CONTENT, "chosen": CONTENT, "rejected": CONTENT}


def as_ids(row: TokenizedRow) -> Row:
    """A tokenised row as columns that the data modules read back to the same tokens."""
    first = row.sequences[0]
    columns: Row = {"prompt_ids": first.prompt_ids.tolist()}
    if len(row.sequences) == 1:
        names = [("response_ids", "token_weights")]
    else:
        names = [("chosen_ids", "chosen_token_weights"), ("rejected_ids", "rejected_token_weights")]
    for sequence, (ids, weights) in zip(row.sequences, names, strict=True):
        if not np.array_equal(sequence.prompt_ids, first.prompt_ids):
            raise DataError(f"row {row.row_id}: the two responses have prompts of other tokens")
        columns[ids] = sequence.response_ids.tolist()
        if sequence.token_weights is not None:
            columns[weights] = sequence.token_weights.tolist()
    return columns


def as_response(prompt: Any, response: Any) -> Any:
    """A response as data modules take it beside this prompt: one message to messages."""
    if isinstance(response, str) and not isinstance(prompt, str):
        return [{"role": "assistant", "content": response}]
    return response


def load_rows(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    max_length: int = sys.maxsize,
) -> tuple[list[Row], list[Row]]:
    """Train and held-out rows, each with `id`, `prompt` and `target` (the right response).

    Rows of questions keep what their answers are judged by; preference rows have `rejected`.

    Args:
        settings: which rows, and what becomes of bad ones.
        tokenizer: of the model: its special tokens must not stand in a row as text.
        folder: takes `rejected_rows.jsonl` where bad rows are skipped.
        max_length: most tokens that every training takes: a row of a file whose prompt alone has
            as many is a bad one.

    Raises:
        DataError: files are missing, or hold bad rows (all are named together) or none at all.
    """
    if settings.kind == "word_problems":
        seed = settings.seed
        train = [question_row(r) for r in word_problems(settings.train_rows, "train", seed)]
        drawn = word_problems(settings.held_out_rows, "held_out", seed)
        held_out = [question_row(r) for r in drawn]
    else:
        train, held_out = _rows_of_files(settings, RowTokenizer(tokenizer, max_length), folder)
    for name, rows in (("train", train), ("held-out", held_out)):
        if not rows:
            raise DataError(f"there are no {name} rows: see the data settings")
    if len({"choices" in row for row in [*train, *held_out]}) > 1:
        raise DataError("some questions have choices and some have none: use two runs")
    return train, held_out


def _rows_of_files(
    settings: DataSettings, tokenize: RowTokenizer, folder: Path
) -> tuple[list[Row], list[Row]]:
    if not settings.train_files:
        raise DataError(f"data.kind {settings.kind} needs data.train_files")
    reader = RowReader(settings.kind, tokenize)
    files = [reader.read(file) for file in settings.train_files]
    held_out = [reader.read(file) for file in settings.held_out_files]
    if settings.on_bad_row == "error":
        reader.bad_rows.raise_if_any()
    elif reader.bad_rows:
        reader.bad_rows.write(folder)
        print(f"{reader.bad_rows.report()}\nskipped; written beside the rows")
    if not held_out:
        files, held_out = _split(files, settings.held_out_every)
    return (
        _take_evenly(files, settings.train_rows, settings.seed),
        _take_evenly(held_out, settings.held_out_rows, settings.seed),
    )


def _split(files: list[list[Row]], every: int) -> tuple[list[list[Row]], list[list[Row]]]:
    """Rows by file: those to train on, and every so-and-so-many-th, which is held out."""
    if every < 2:
        raise DataError(f"data.held_out_every is {every}: at least 2")
    held_out = [rows[::every] for rows in files]
    return [[row for i, row in enumerate(rows) if i % every] for rows in files], held_out


def _take_evenly(files: Sequence[list[Row]], count: int, seed: int) -> list[Row]:
    """`count` rows (0: all), the same share of each file, in an order drawn from `seed`."""
    shuffled = [
        random.Random(f"{seed} {i}").sample(rows, len(rows)) for i, rows in enumerate(files)
    ]
    if count and count > sum(map(len, shuffled)):
        raise DataError(f"{count} rows are asked for, the files have {sum(map(len, shuffled))}")
    mixed: list[Row] = []
    for i in range(max(map(len, shuffled), default=0)):
        mixed += [rows[i] for rows in shuffled if i < len(rows)]
    return mixed[: count or None]


@dataclasses.dataclass
class RowReader:
    """Reads files of one kind and collects their bad rows.

    Attributes:
        kind: of the rows.
        tokenize: what they must be fit for.
        required: columns that no row may lack.
        bad_rows: of the files read so far.
    """

    kind: DataKind
    tokenize: RowTokenizer
    required: tuple[str, ...] = ()
    bad_rows: BadRows = dataclasses.field(default_factory=BadRows)

    def read(self, file: str) -> list[Row]:
        """The usable rows of a file."""
        source = Path(file).stem
        rows = []
        for line, columns in read_rows(file, self.bad_rows):
            try:
                row = self._checked(columns)
            except BadRowError as error:
                self.bad_rows.add(file, line, error, columns)
            else:
                rows.append({"id": f"{source}-{line}", "source": source} | row)
        return rows

    def _checked(self, columns: Mapping[str, Any]) -> Row:
        """The row, if training and sampling can use it."""
        typed: PreferenceRow | SFTRow
        if absent := [name for name in self.required if columns.get(name) is None]:
            raise BadRowError(f"lacks {', '.join(absent)}")
        if self.kind == "preference":
            row = preference_columns(columns)
            row["target"] = row.pop("chosen")
            typed = PreferenceRow(row["prompt"], row["target"], row["rejected"])
        else:
            row = question_row(columns)
            typed = SFTRow(row["prompt"], as_response(row["prompt"], row["target"]))
        check_row(typed)
        for choice in row.get("choices", ()):
            check_text(choice, "an empty choice")
        if not isinstance(typed.prompt, str) and not is_messages(typed.prompt):
            raise BadRowError("token ids: text is needed here")
        texts = (row["target"], row.get("rejected", ""), *row.get("choices", ()))
        for content in (row["prompt"], *texts):
            if found := self.tokenize.encoder.special_tokens_in(content):
                raise BadRowError("special token as text", found[0])
        self.tokenize(typed)
        return row


def question_row(columns: Mapping[str, Any]) -> Row:
    """A question's columns with its `prompt` and `target`.

    Raises:
        BadRowError: it is no question, or has no answer that can be checked.
    """
    choices = columns.get("choices")
    if "prompt" not in columns and not isinstance(columns.get("question"), str):
        raise BadRowError("neither `prompt` nor `question`")
    if choices is None and columns.get("final_answer") is None:
        raise BadRowError("neither `choices` nor `final_answer`")
    if choices is not None:
        if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
            raise BadRowError("choices is not a list of texts")
        answer = columns.get("answer_index")
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise BadRowError("answer_index is not one of the choices")
    elif not is_number(str(columns["final_answer"])):
        raise BadRowError("final_answer is not a number", str(columns["final_answer"])[:40])
    try:
        prompt, target = question_prompt(columns), target_response(columns)
    except DataError as error:
        raise BadRowError("not a question", str(error)) from error
    kept = {name: value for name, value in columns.items() if value is not None}
    return kept | {"prompt": prompt, "target": target}


def preference_columns(columns: Mapping[str, Any]) -> Row:
    """A pair in any format as `prompt`, `chosen`, `rejected`.

    Raises:
        BadRowError: the columns fit no format of pairs.
    """
    row = parse_row(dict(columns), FORMATS[PreferenceRow])
    return {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}


def is_right(row: Mapping[str, Any], response: str) -> bool:
    """Whether a response names the row's answer (a choice, or a number after the answer's mark)."""
    if "choices" in row:
        return extract_choice(response, row["choices"]) == row["answer_index"]
    return extract_final_answer(response) == normalise_number(str(row["final_answer"]))


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows, one JSON object a line, whole or not at all."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(path, "".join(lines).encode())


def read_jsonl(path: Path, form: Any = dict) -> list[Row]:
    """Read rows that `write_jsonl` wrote.

    Raises:
        PipelineError: the file is damaged, or a row is not of the form (see `check_form`).
    """
    with _reading(path):
        rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
        for number, row in enumerate(rows, 1):
            check_form(row, form, f"row {number}")
    return rows


def read_json(path: Path, form: Any = dict) -> Any:
    """Read one JSON document.

    Raises:
        PipelineError: the file is damaged, or not of the form (see `check_form`).
    """
    with _reading(path):
        value = read_json_file(path)
        check_form(value, form)
    return value


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """A run's folder may come from anybody, and its files are no better than what wrote them."""
    try:
        yield
    except (OSError, ValueError, RecursionError) as error:
        raise PipelineError(
            f"{path} is not what a run writes there: {error}; remove {path.parent} to have it "
            "written anew"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document, whole or not at all."""
    write_atomically(path, (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode())
