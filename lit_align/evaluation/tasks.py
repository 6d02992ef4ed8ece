"""Tasks a model is evaluated on, each a share of rows that come out right with its interval."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_align.errors import DataError
from lit_align.evaluation.answers import extract_choice, extract_final_answer, normalise_number
from lit_align.evaluation.generation import generate
from lit_align.evaluation.intervals import wilson_interval
from lit_align.evaluation.prompts import (
    ANSWER_MARK,
    encode_prompt,
    encode_response,
    question_prompt,
)
from lit_align.evaluation.scoring import response_logps

Row: TypeAlias = Mapping[str, Any]
Task: TypeAlias = Literal["exact_answer", "multiple_choice", "preference"]
Mode: TypeAlias = Literal["logps", "generate"]
REQUIRED_FIELDS = {
    "exact_answer": ("final_answer",),
    "multiple_choice": ("question", "choices", "answer_index"),
    "preference": ("prompt", "chosen", "rejected"),
}


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    task: Task,
    *,
    limit: int | None = None,
    mode: Mode = "logps",
    max_new_tokens: int = 48,
    last_number: bool = False,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate a model on rows.

    - `exact_answer` (`question` or `prompt`, and `final_answer`): the number after "The answer is:"
      in the greedy response is the right one.
    - `multiple_choice` (`question`, `choices`, `answer_index`): the choice whose text, after
      "The answer is:", has the highest log-prob a token (`accuracy`) or in all (`accuracy_raw`);
      with mode `generate`, the choice that the greedy response names.
    - `preference` (`prompt`, `chosen`, `rejected`): chosen has the higher log-prob in all
      (`accuracy`) or a token (`accuracy_per_token`).

    Args:
        model: any causal LM.
        tokenizer: its tokenizer.
        rows: of the fields above.
        task: see above.
        limit: only the first so many rows.
        mode: of `multiple_choice`.
        max_new_tokens: of a generated response.
        last_number: see `extract_final_answer`.
        batch_size: responses generated at a time, or prompts scored: a quarter of it.
        progress: show a bar.

    Returns:
        `task`, `mode`, `n`, `accuracy` in [0, 1] with Wilson's 95 % interval `low`, `high`, further
        accuracies as above, `seconds`, and `records`: one dict a row, with `id` and `correct`.

    Raises:
        DataError: No rows, an unknown task or mode, or a row without the fields of the task.
    """
    rows = list(rows[:limit])
    _check(rows, task, mode)
    begin = time.perf_counter()
    score_batch = max(1, batch_size // 4)
    if task == "preference":
        records = _preference(model, tokenizer, rows, score_batch, progress)
    elif task == "multiple_choice" and mode == "logps":
        records = _likeliest_choice(model, tokenizer, rows, score_batch, progress)
    else:
        responses = generate(
            model,
            tokenizer,
            [question_prompt(row) for row in rows],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=progress,
        )
        judge = _judge_choice if task == "multiple_choice" else _judge_number(last_number)
        records = [judge(row, texts[0]) for row, texts in zip(rows, responses, strict=True)]
    return {
        "task": task,
        "mode": "generate" if task == "exact_answer" else mode,
        **_summary(records),
        "seconds": time.perf_counter() - begin,
        "records": records,
    }


def _check(rows: Sequence[Row], task: str, mode: str) -> None:
    if task not in REQUIRED_FIELDS or mode not in ("logps", "generate"):
        raise DataError(f"task {task!r} in mode {mode!r}: tasks are {', '.join(REQUIRED_FIELDS)}")
    if not rows:
        raise DataError("there are no rows to evaluate on")
    for number, row in enumerate(rows, start=1):
        if absent := [name for name in REQUIRED_FIELDS[task] if row.get(name) is None]:
            raise DataError(f"row {number} lacks {', '.join(absent)}, which {task} needs")
        if task == "multiple_choice" and not 0 <= row["answer_index"] < len(row["choices"]):
            raise DataError(f"row {number}: answer_index {row['answer_index']} is not a choice")


def _summary(records: Sequence[Row]) -> dict[str, Any]:
    """Accuracy and interval of `correct`, and an accuracy for each further `correct_<name>`."""
    n = len(records)
    right = sum(record["correct"] for record in records)
    low, high = wilson_interval(right, n)
    summary = {"n": n, "accuracy": right / n, "low": low, "high": high}
    for key in records[0]:
        if key.startswith("correct_"):
            name = key.replace("correct", "accuracy", 1)
            summary[name] = sum(record[key] for record in records) / n
    return summary


def _judge_number(last_number: bool) -> Callable[[Row, str], dict[str, Any]]:
    def judge(row: Row, response: str) -> dict[str, Any]:
        answer = extract_final_answer(response, last_number=last_number)
        correct = answer == normalise_number(str(row["final_answer"]))
        return {"id": row.get("id"), "correct": correct, "answer": answer, "response": response}

    return judge


def _judge_choice(row: Row, response: str) -> dict[str, Any]:
    answer = extract_choice(response, row["choices"])
    correct = answer == row["answer_index"]
    return {"id": row.get("id"), "correct": correct, "answer": answer, "response": response}


def _likeliest_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    batch_size: int,
    progress: bool,
) -> list[dict[str, Any]]:
    # The mark belongs to the context: only the choices' own tokens are compared.
    mark = encode_response(tokenizer, ANSWER_MARK)
    prompts = [encode_prompt(tokenizer, question_prompt(row)) + mark for row in rows]
    choices = [[encode_response(tokenizer, f" {c}") for c in row["choices"]] for row in rows]
    pad_id = int(tokenizer.pad_token_id or 0)
    scored = response_logps(
        model, prompts, choices, pad_id=pad_id, batch_size=batch_size, progress=progress
    )
    records = []
    for row, logps in zip(rows, scored, strict=True):
        sums = [float(x.sum()) for x in logps]
        means = [float(x.mean()) for x in logps]
        raw, answer = sums.index(max(sums)), means.index(max(means))
        records.append(
            {
                "id": row.get("id"),
                "correct": answer == row["answer_index"],
                "correct_raw": raw == row["answer_index"],
                "answer": answer,
                "answer_raw": raw,
                "logps": sums,
            }
        )
    return records


def _preference(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    batch_size: int,
    progress: bool,
) -> list[dict[str, Any]]:
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    end = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
    pairs = [
        [[*encode_response(tokenizer, _text(row[side])), end] for side in ("chosen", "rejected")]
        for row in rows
    ]
    pad_id = int(tokenizer.pad_token_id or 0)
    scored = response_logps(
        model, prompts, pairs, pad_id=pad_id, batch_size=batch_size, progress=progress
    )
    return [
        {
            "id": row.get("id"),
            "correct": bool(chosen.sum() > rejected.sum()),
            "correct_per_token": bool(chosen.mean() > rejected.mean()),
            "chosen_logps": float(chosen.sum()),
            "rejected_logps": float(rejected.sum()),
        }
        for row, (chosen, rejected) in zip(rows, scored, strict=True)
    ]


def _text(response: str | Sequence[Mapping[str, str]]) -> str:
    """The text of a response given as text or as one assistant message."""
    if isinstance(response, str):
        return response
    if len(response) != 1 or response[0]["role"] != "assistant":
        raise DataError("chosen and rejected must be text or one assistant message each")
    return response[0]["content"]
