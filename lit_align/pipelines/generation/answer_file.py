"""The files that AlpacaEval and MT-Bench read answers from, written whole after every batch."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lit_align.errors import DataError, PipelineError
from lit_align.pipelines.generation.questions import AskedQuestion
from lit_align.pipelines.rows import read_json, read_jsonl, write_json, write_jsonl

AnswerFormat: TypeAlias = Literal["alpaca_eval", "mt_bench"]
Record: TypeAlias = dict[str, Any]
SETTINGS_SUFFIX = ".settings.json"


class AnswerFile:
    """The answers in a file, by the place of their question, and how they are written."""

    def __init__(
        self, path: Path, format: AnswerFormat, settings: Record, asked: Sequence[AskedQuestion]
    ) -> None:
        """Read what is there; make the folder.

        Raises:
            DataError: the file is of other settings, or has answers to other questions; questions
                that the format cannot hold.
        """
        self.path, self.format, self.settings, self.asked = path, format, settings, asked
        if format == "alpaca_eval":
            for question in asked:
                if len(question.question.turns) > 1:
                    raise DataError(
                        f"question {question.question_id} has {len(question.question.turns)} "
                        "turns, alpaca_eval holds one: use format mt_bench"
                    )
        self.records: dict[int, Record] = self._read() if path.exists() else {}
        path.parent.mkdir(parents=True, exist_ok=True)  # fails before hours of answers, not after

    def add(self, answers: dict[int, list[list[str]]]) -> None:
        """Take in (place → choices → turns) and write the file anew."""
        for place, choices in answers.items():
            self.records[place] = self._record(self.asked[place], choices)
        records = [self.records[place] for place in sorted(self.records)]
        write_json(self._settings_path, self.settings)  # first: answers without it are refused
        if self.format == "alpaca_eval":
            write_json(self.path, records)
        else:
            write_jsonl(self.path, records)

    def _record(self, asked: AskedQuestion, choices: list[list[str]]) -> Record:
        if self.format == "alpaca_eval":
            return {
                "dataset": asked.dataset,
                "instruction": asked.instruction,
                "output": choices[0][0],
                "generator": self.settings["name"],
            }
        named = f"{self.settings['name']}/{asked.question_id}/{self.settings['seed']}"
        return {
            "question_id": asked.question_id,
            "answer_id": hashlib.sha256(named.encode()).hexdigest()[:22],
            "model_id": self.settings["name"],
            "choices": [{"index": i, "turns": turns} for i, turns in enumerate(choices)],
            "tstamp": time.time(),
        }

    @property
    def _settings_path(self) -> Path:
        return self.path.with_name(self.path.name + SETTINGS_SUFFIX)

    def _read(self) -> dict[int, Record]:
        self._check_settings()
        field = "instruction" if self.format == "alpaca_eval" else "question_id"
        places: dict[Any, list[int]] = defaultdict(list)
        for place, asked in enumerate(self.asked):
            places[getattr(asked, field)].append(place)
        try:
            records = self._read_records({field: object})
            return {places[record[field]].pop(0): record for record in records}
        except (PipelineError, TypeError) as error:
            raise DataError(f"{self.path}: damaged: {error}; remove it to begin anew") from error
        except IndexError as error:
            raise DataError(
                f"{self.path} answers questions that are not among these: name another output, or "
                "remove it"
            ) from error

    def _read_records(self, form: Record) -> list[Record]:
        if self.format == "alpaca_eval":
            records: list[Record] = read_json(self.path, [form])
            return records
        return read_jsonl(self.path, form)

    def _check_settings(self) -> None:
        try:
            before = read_json(self._settings_path)
        except PipelineError as error:
            raise DataError(
                f"{self.path} is there, and {self._settings_path.name}, which says how its answers "
                "were made, cannot be read: name another output, or remove it"
            ) from error
        differing = sorted(k for k, v in self.settings.items() if before.get(k) != v)
        if differing:
            what = ", ".join(f"{k} ({before.get(k)} there, {self.settings[k]})" for k in differing)
            raise DataError(
                f"{self.path} holds answers of other settings: {what}; name another output, or "
                "remove it"
            )
