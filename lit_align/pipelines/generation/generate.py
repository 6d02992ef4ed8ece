"""Answers of a model to a benchmark's questions, in the files that its judges read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from lit_align.compact import Delta, apply_adapters, apply_delta
from lit_align.data.templates import chat_template_text
from lit_align.errors import DataError
from lit_align.evaluation.conversations import check_lengths, converse
from lit_align.language_model import load_language_model
from lit_align.pipelines.generation.answer_file import AnswerFile, AnswerFormat
from lit_align.pipelines.generation.questions import read_questions
from lit_align.pipelines.training import inference_device

# FastChat's temperatures (fastchat/llm_judge/common.py), and that of every other category.
CATEGORY_TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0,
    "reasoning": 0.0, "stem": 0.1, "humanities": 0.1,
}  # fmt: skip
OTHER_TEMPERATURE = 0.7


def generate_answers(
    model: str,
    data: str,
    output: str,
    format: AnswerFormat = "alpaca_eval",
    name: str | None = None,
    delta: str | None = None,
    adapter: str | None = None,
    chat_template: str | None = None,
    limit: int | None = None,
    max_new_tokens: int = 512,
    temperature: float | Literal["category"] = 0.0,
    top_p: float = 1.0,
    num_choices: int = 1,
    stop: str | None = None,
    batch_size: int = 16,
    seed: int = 0,
    accelerator: str = "auto",
) -> dict[str, Any]:
    """Let a model answer questions; answers that the file holds already are kept.

    The file is written anew after every batch, whole or not at all, and `<output>.settings.json`
    beside it says what its answers depend on. A killed run, once run again, ends in the same
    answers.

    Args:
        model: local folder, hub id or alias.
        data: questions: JSONL, JSON, Parquet or CSV file, `datasets` folder or hub id, with the
            columns `turns`, `instruction`, `prompt` or `question`.
        output: file of the answers.
        format: `alpaca_eval` (a JSON list of instruction, output, generator, dataset; one turn) or
            `mt_bench` (FastChat's JSON lines; any number of turns, each of which sees the answers
            before it).
        name: what the file calls the model; default the last part of `model`.
        delta: a delta to apply to the model first.
        adapter: folder of adapters (LoRA or AdaLoRA, as peft writes it) to merge into the model.
        chat_template: in place of the tokenizer's own: `transcript` (Human/Assistant, for base
            models), a file's path, or the Jinja text.
        limit: only the first so many questions.
        max_new_tokens: most tokens of an answer.
        temperature: 0: greedy; `category`: by the question's category, as FastChat has it.
        top_p: nucleus; 1 keeps the whole distribution.
        num_choices: answers a question (of `mt_bench`).
        stop: a text that ends an answer; it and what follows are cut off.
        batch_size: questions at a time.
        seed: of the draws.
        accelerator: the machine's (auto), or cpu.

    Returns:
        `answers` in the file, how many of them it held before (`kept`), and `seconds`.

    Raises:
        ModelError: no such model, or adapters of another one.
        DataError: bad rows, a file of other settings or questions, questions that do not fit the
            format, the chat template or the model's context.
    """
    begin = time.perf_counter()
    _check_numbers(limit, num_choices, batch_size, format)
    language_model, tokenizer = _loaded(model, delta, adapter, chat_template)
    asked = read_questions(data, tokenizer)
    check_lengths(language_model, tokenizer, [q.question for q in asked[:limit]], max_new_tokens)
    settings = {
        "model": language_model.base_fingerprint,
        "delta": None if delta is None else Delta.load(delta).checksum,
        "adapter": None if adapter is None else _digest_of_folder(Path(adapter)),
        "chat_template": _digest(tokenizer.chat_template),
        "questions": _digest([dataclasses.asdict(q.question) for q in asked]),
        "name": name or Path(model).name,
        "format": format,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "num_choices": num_choices,
        "stop": stop,
        "seed": seed,
    }
    file = AnswerFile(Path(output), format, settings, asked)
    language_model.to(inference_device(accelerator))  # type: ignore[arg-type]
    kept = len(file.records)
    for batch in _batches(file, limit, batch_size, temperature):
        answers = converse(
            language_model,
            tokenizer,
            [asked[i].question for i in batch.places],
            max_new_tokens=max_new_tokens,
            temperature=batch.temperature,
            top_p=top_p,
            num_choices=num_choices,
            batch_size=batch_size,
            seed=seed,
            stop=stop,
        )
        file.add(dict(zip(batch.places, answers, strict=True)))
    seconds = round(time.perf_counter() - begin, 3)
    summary = {"answers": len(file.records), "kept": kept, "seconds": seconds, "output": output}
    print(json.dumps(summary))
    return summary


def _check_numbers(
    limit: int | None, num_choices: int, batch_size: int, format: AnswerFormat
) -> None:
    if min(num_choices, batch_size, 1 if limit is None else limit) < 1:
        raise DataError("limit, num_choices and batch_size are at least 1")
    if format == "alpaca_eval" and num_choices > 1:
        raise DataError("alpaca_eval has one answer a question: num_choices is of mt_bench")


def _loaded(
    model: str, delta: str | None, adapter: str | None, chat_template: str | None
) -> tuple[Any, Any]:
    """The model with what was trained, and its tokenizer with a chat template."""
    language_model, tokenizer = load_language_model(model)
    if chat_template is not None:
        tokenizer.chat_template = chat_template_text(chat_template)
    if tokenizer.chat_template is None:
        raise DataError(
            f"{model} has no chat template: give --chat_template (`transcript` suits base models)"
        )
    if delta is not None:
        apply_delta(language_model, delta)
    if adapter is not None:
        apply_adapters(language_model, adapter)
    return language_model, tokenizer


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Questions, by their places, that are answered together."""

    places: list[int]
    temperature: float


def _batches(
    file: AnswerFile, limit: int | None, size: int, temperature: float | Literal["category"]
) -> Iterator[_Batch]:
    """The questions that wait, batches being the same whatever was answered before."""
    places = range(len(file.asked[:limit]))
    by_temperature: dict[float, list[int]] = defaultdict(list)
    for place in places:
        category = file.asked[place].category
        of_category = CATEGORY_TEMPERATURES.get(category or "", OTHER_TEMPERATURE)
        by_temperature[of_category if temperature == "category" else temperature].append(place)
    for degree, group in by_temperature.items():
        for start in range(0, len(group), size):
            waiting = [p for p in group[start : start + size] if p not in file.records]
            if waiting:
                yield _Batch(waiting, degree)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _digest_of_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
