"""ALLO's token rewards as stages: corrections, the reward model, weights."""

from __future__ import annotations

import json
from pathlib import Path

from lit_align.errors import PipelineError
from lit_align.language_model import (
    load_tokenizer,
    resolve_model,
)
from lit_align.pipelines.allo_run import AlloRun
from lit_align.pipelines.allo_stages import fine_tune
from lit_align.pipelines.corrections import Teacher, correct_predictions
from lit_align.pipelines.predictions import Prediction
from lit_align.pipelines.reward_model import RewardModel
from lit_align.pipelines.rewriting import rewriting_rows
from lit_align.pipelines.rows import (
    is_right,
    write_json,
    write_jsonl,
)
from lit_align.pipelines.run_folder import MODEL_FOLDER
from lit_align.pipelines.token_rewards import weighted_rows


def correct(run: AlloRun, folder: Path) -> None:
    """Corrections of the wrong responses."""
    teacher, settings = None, run.token_rewards
    if settings.teacher == "model":
        model, tokenizer = run.load(teacher_folder(run))
        teacher = Teacher(
            model,
            tokenizer,
            max_new_tokens=settings.teacher_max_new_tokens,
            temperature=settings.teacher_temperature,
            num_samples=settings.teacher_num_samples,
        )
    can_judge = run.data.kind != "preference"
    corrections = correct_predictions(
        _wrong(run),
        settings.teacher,
        is_correct=is_right if can_judge else None,
        teacher=teacher,
    )
    write_json(folder / "corrections.json", corrections._asdict())


def train_reward_model(run: AlloRun, folder: Path) -> None:
    """Fine-tune on the rewriting task."""
    right = []
    if run.token_rewards.identity_rewrites:
        rows = run.rows("pairs", "pairs")
        distinct = {json.dumps([r["prompt"], r["chosen"]]): r for r in rows}.values()
        right = [Prediction.from_row(r | {"target": r["chosen"]}, r["chosen"]) for r in distinct]
    task = rewriting_rows(_wrong(run), _correction_texts(run), right)
    fine_tune(run, str(reward_base(run)), task, run.token_rewards, folder)


def weigh(run: AlloRun, folder: Path) -> None:
    """A weight for every token of the wrong responses."""
    settings = run.token_rewards
    reward_model = None
    if settings.kind != "edit":
        model, tokenizer = run.load(run.output / "reward_model" / MODEL_FOLDER)
        reward_model = RewardModel(model, tokenizer, settings.max_length)
    weighted = weighted_rows(
        _wrong(run),
        _correction_texts(run),
        load_tokenizer(run.start),
        rule=settings.kind,
        threshold=settings.threshold,
        reward_model=reward_model,
    )
    write_jsonl(folder / "weighted.jsonl", weighted.rows)
    write_json(folder / "statistics.json", weighted.statistics)


def _wrong(run: AlloRun) -> list[Prediction]:
    return [Prediction.from_row(row) for row in run.rows("pairs", "wrong")]


def _correction_texts(run: AlloRun) -> list[str | None]:
    path = run.output / "corrections" / "corrections.json"
    return json.loads(path.read_text("utf-8"))["texts"]


def teacher_folder(run: AlloRun) -> Path:
    """The teacher's folder.

    Raises:
        PipelineError: none is named.
    """
    if run.token_rewards.teacher_model is None:
        raise PipelineError("token_rewards.teacher: model needs token_rewards.teacher_model")
    return resolve_model(run.token_rewards.teacher_model)


def reward_base(run: AlloRun) -> Path:
    """What the reward model is trained from."""
    return resolve_model(run.token_rewards.reward_model or run.start)
