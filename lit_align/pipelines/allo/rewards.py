"""ALLO's token rewards as stages: corrections, the reward model, weights."""

from __future__ import annotations

import json
from pathlib import Path

from lit_align.errors import PipelineError
from lit_align.language_model import (
    load_tokenizer,
    resolve_model,
)
from lit_align.pipelines.allo.run import AlloRun
from lit_align.pipelines.allo.stages import fine_tune
from lit_align.pipelines.rewards.corrections import RemoteTeacher, Teacher, correct_predictions
from lit_align.pipelines.rewards.endpoint import Endpoint
from lit_align.pipelines.rewards.predictions import Prediction
from lit_align.pipelines.rewards.reward_model import RewardModel
from lit_align.pipelines.rewards.rewriting import rewriting_rows
from lit_align.pipelines.rewards.token_rewards import weighted_rows
from lit_align.pipelines.rows import (
    is_right,
    read_json,
    write_json,
    write_jsonl,
)
from lit_align.pipelines.run_folder import MODEL_FOLDER

TEACHER_CACHE = "teacher_answers"
SHOWN_FAILURES = 10


def correct(run: AlloRun, folder: Path) -> None:
    """Corrections of the wrong responses."""
    settings = run.token_rewards
    teacher: Teacher | RemoteTeacher | None = None
    if settings.teacher == "model":
        model, tokenizer = run.load(teacher_folder(run))
        teacher = Teacher(
            model,
            tokenizer,
            max_new_tokens=settings.teacher_max_new_tokens,
            temperature=settings.teacher_temperature,
            num_samples=settings.teacher_num_samples,
        )
    elif settings.teacher == "endpoint":
        tokenizer = load_tokenizer(run.start)
        teacher = RemoteTeacher(endpoint(run), tokenizer, settings.teacher_num_samples)
    can_judge = run.data.kind != "preference"
    corrections = correct_predictions(
        _wrong(run),
        settings.teacher,
        is_correct=is_right if can_judge else None,
        teacher=teacher,
    )
    for failure in corrections.failures[:SHOWN_FAILURES]:
        print(f"row {failure['id']}: {failure['reason']}: {failure['detail']}")
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
    texts: list[str | None] = read_json(path, {"texts": [(str, type(None))]})["texts"]
    if len(texts) != (wrong := len(run.rows("pairs", "wrong"))):
        raise PipelineError(f"{path} corrects {len(texts)} responses of {wrong}")
    return texts


def teacher_folder(run: AlloRun) -> Path:
    """The teacher's folder.

    Raises:
        PipelineError: none is named.
    """
    if run.token_rewards.teacher_model is None:
        raise PipelineError("token_rewards.teacher: model needs token_rewards.teacher_model")
    return resolve_model(run.token_rewards.teacher_model)


def endpoint(run: AlloRun) -> Endpoint:
    """The teacher's endpoint; its answers are kept in the run's folder, outside its stages.

    Raises:
        PipelineError: no address or model, or no API key where one is asked for.
    """
    settings = run.token_rewards
    found = Endpoint(
        str(settings.teacher_url),
        str(settings.teacher_model),
        run.output / TEACHER_CACHE,
        key_variable=settings.teacher_key_variable,
        max_tokens=settings.teacher_max_new_tokens,
        temperature=settings.teacher_temperature,
        timeout_seconds=settings.teacher_timeout_seconds,
        max_retries=settings.teacher_max_retries,
        concurrency=settings.teacher_concurrency,
    )
    found.key()
    return found


def check_teacher(run: AlloRun) -> None:
    """Find out before hours of training whether the teacher can be asked.

    Raises:
        PipelineError: an API key is not set, or rewrites cannot be judged.
    """
    if run.token_rewards.teacher != "endpoint":
        return
    if run.data.kind == "preference":
        raise PipelineError(
            "token_rewards.teacher: endpoint needs rewrites that can be judged, and pairs have no "
            "answer to judge by: use questions, or teacher: gold or column"
        )
    if not (run.output / "corrections").is_dir():
        endpoint(run)


def reward_base(run: AlloRun) -> Path:
    """What the reward model is trained from."""
    return resolve_model(run.token_rewards.reward_model or run.start)
