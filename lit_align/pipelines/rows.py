"""The rows that a pipeline works on: read, split, prompted, judged, written."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_align.data.bad_rows import BadRows
from lit_align.data.files import read_rows
from lit_align.data.formats import FORMATS, parse_row
from lit_align.data.schema import PreferenceRow
from lit_align.errors import DataError
from lit_align.evaluation import (
    extract_choice,
    extract_final_answer,
    normalise_number,
    question_prompt,
    target_response,
)
from lit_align.files import write_atomically
from lit_align.pipelines.settings import DataSettings
from lit_align.pipelines.word_problems import word_problems

Row = dict[str, Any]


def as_response(prompt: Any, response: Any) -> Any:
    """A response as data modules take it beside this prompt: one message to messages."""
    if isinstance(response, str) and not isinstance(prompt, str):
        return [{"role": "assistant", "content": response}]
    return response


def load_rows(settings: DataSettings) -> tuple[list[Row], list[Row]]:
    """Train and held-out rows, each with `id`, `prompt` and `target` (the right response).

    Rows of questions keep what their answers are judged by; preference rows have `rejected`.

    Raises:
        DataError: files are missing or hold rows of another kind; names file and row.
    """
    if settings.kind == "word_problems":
        problems = word_problems(settings.train_rows, "train", settings.seed)
        others = word_problems(settings.held_out_rows, "held_out", settings.seed)
        return [_question(r) for r in problems], [_question(r) for r in others]
    if not settings.train_files:
        raise DataError(f"data.kind {settings.kind} needs data.train_files")
    train, spare = _read_split(settings)
    if settings.held_out_files:
        spare = [_read(f, settings.kind) for f in settings.held_out_files]
    return (
        _take_evenly(train, settings.train_rows, settings.seed),
        _take_evenly(spare, settings.held_out_rows, settings.seed),
    )


def _read_split(settings: DataSettings) -> tuple[list[list[Row]], list[list[Row]]]:
    """Rows by file: those to train on, and those held out where no file is named for them."""
    files = [_read(f, settings.kind) for f in settings.train_files]
    if settings.held_out_files:
        return files, []
    every = settings.held_out_every
    if every < 2:
        raise DataError(f"data.held_out_every is {every}: at least 2")
    held = [[row for i, row in enumerate(rows) if i % every == 0] for rows in files]
    return [[row for i, row in enumerate(rows) if i % every] for rows in files], held


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


def _read(file: str, kind: str) -> list[Row]:
    bad_rows = BadRows()
    make = _preference if kind == "preference" else _question
    rows = []
    for line, columns in read_rows(file, bad_rows):
        try:
            rows.append(
                {"id": f"{Path(file).stem}-{line}", "source": Path(file).stem} | make(columns)
            )
        except DataError as error:
            raise DataError(f"{file}, line {line}: {error}") from error
    bad_rows.raise_if_any()
    return rows


def _question(columns: Mapping[str, Any]) -> Row:
    return dict(columns) | {
        "prompt": question_prompt(columns),
        "target": target_response(columns),
    }


def _preference(columns: Mapping[str, Any]) -> Row:
    row = parse_row(dict(columns), FORMATS[PreferenceRow])
    return {"prompt": row.prompt, "target": row.chosen, "rejected": row.rejected}


def is_right(row: Mapping[str, Any], response: str) -> bool:
    """Whether a response names the row's answer (a choice, or a number after the answer's mark)."""
    if row.get("choices"):
        return extract_choice(response, row["choices"]) == row["answer_index"]
    return extract_final_answer(response) == normalise_number(str(row["final_answer"]))


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows, one JSON object a line, whole or not at all."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(path, "".join(lines).encode())


def read_jsonl(path: Path) -> list[Row]:
    """Read rows that `write_jsonl` wrote."""
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document, whole or not at all."""
    write_atomically(path, (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode())
