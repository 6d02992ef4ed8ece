"""The table's models on the held-out rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_align.compact import apply_delta
from lit_align.evaluation import evaluate
from lit_align.pipelines.allo.run import DELTA_FILE, AlloRun
from lit_align.pipelines.rows import (
    Row,
    write_json,
)


def evaluator(run: AlloRun, model_folder: Path, *, has_delta: bool) -> Callable[[Path], None]:
    """A stage that evaluates one model on the held-out rows."""

    def evaluate_model(folder: Path) -> None:
        model, tokenizer = run.load(model_folder)
        if has_delta:
            apply_delta(model, run.output / "improve" / DELTA_FILE)
        metrics = _evaluate(run, model, tokenizer, run.rows("data", "held_out"))
        write_json(folder / "metrics.json", metrics)

    return evaluate_model


def _evaluate(run: AlloRun, model: Any, tokenizer: Any, rows: list[Row]) -> dict[str, Any]:
    """Metrics over all rows, and the accuracy of each file's rows where there are several."""
    if run.data.kind == "preference":
        rows = [row | {"chosen": row["target"]} for row in rows]
        return evaluate(model, tokenizer, rows, "preference")
    task: Any = "multiple_choice" if "choices" in rows[0] else "exact_answer"
    s = run.evaluate
    metrics = evaluate(
        model,
        tokenizer,
        rows,
        task,
        mode=s.mode if task == "multiple_choice" else "generate",
        max_new_tokens=s.max_new_tokens,
        last_number=s.last_number,
        batch_size=s.batch_size,
    )
    return metrics | {"by_source": accuracy_by_source(rows, metrics["records"])}


def accuracy_by_source(rows: list[Row], records: list[Row]) -> dict[str, dict[str, float]]:
    """N and right answers of each source's rows."""
    table: dict[str, dict[str, float]] = {}
    for row, record in zip(rows, records, strict=True):
        entry = table.setdefault(str(row.get("source", "all")), {"n": 0, "right": 0})
        entry["n"] += 1
        entry["right"] += bool(record["correct"])
    return table
