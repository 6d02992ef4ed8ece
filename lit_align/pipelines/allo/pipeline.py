"""ALLO, end to end (arXiv 2406.12606): warm up, locate, forget, improve."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from lit_align.gguf_alias import ALIAS
from lit_align.language_model import resolve_model
from lit_align.pipelines.allo import rewards as rewards
from lit_align.pipelines.allo import stages as stages
from lit_align.pipelines.allo.evaluation import evaluator
from lit_align.pipelines.allo.run import AlloRun
from lit_align.pipelines.allo.summary import summarise
from lit_align.pipelines.run_folder import MODEL_FOLDER
from lit_align.pipelines.settings import (
    DataSettings,
    DPOSettings,
    EvaluateSettings,
    ForgetSettings,
    ImproveSettings,
    LocateSettings,
    RunSettings,
    SampleSettings,
    SFTSettings,
    TokenRewardSettings,
)
from lit_align.pipelines.stage import Stage, run_stages
from lit_align.pipelines.training import as_config


def stages_of(run: AlloRun) -> list[Stage]:
    """All stages, in order; each reads files and earlier stages alone."""
    base = resolve_model(run.model)
    start = run.start_inputs()
    files = [Path(f) for f in (*run.data.train_files, *run.data.held_out_files)]
    common = as_config(run.machine)
    if files:
        files.append(base)  # rows are checked with its tokenizer
    data = as_config(run.data) | ({"max_length": run.max_length} if files else {})
    listed = [Stage("data", data, files, partial(stages.prepare_data, run))]
    if run.sft.enabled:
        listed.append(
            Stage(
                "sft",
                as_config(run.sft) | common,
                [base, "data"],
                partial(stages.fine_tune_start, run),
            )
        )
    drawn: list[Path | str] = ["data"]
    if run.data.kind != "preference":
        listed.append(
            Stage("sample", as_config(run.sample), [*start, "data"], partial(stages.draw, run))
        )
        drawn = ["sample"]
    warm_up, locate = as_config(run.warm_up) | common, as_config(run.locate) | common
    listed += [
        Stage("pairs", as_config(run.sample), drawn, partial(stages.pair, run)),
        Stage("warm_up", warm_up, [*start, "pairs"], partial(stages.warm_up, run)),
        Stage("locate", locate, [*start, "warm_up", "pairs"], partial(stages.locate, run)),
        *_reward_model_stages(run, common),
        _token_rewards_stage(run, common),
    ]
    if run.forget.enabled:
        config = as_config(run.forget) | common
        inputs = [*start, "locate", "token_rewards"]
        listed.append(Stage("forget", config, inputs, partial(stages.forget, run)))
    forgotten = ["forget"] if run.forget.enabled else []
    config = as_config(run.improve) | common
    inputs = [*start, "locate", "pairs", *forgotten]
    listed.append(Stage("improve", config, inputs, partial(stages.improve, run)))
    config = {"merge_model": run.merge_model}
    listed.append(Stage("export", config, [*start, "improve"], partial(stages.export, run)))
    return listed + _evaluation_stages(run, base, start)


def _reward_model_stages(run: AlloRun, common: dict[str, Any]) -> list[Stage]:
    """Corrections, and the reward model where the weights need one."""
    settings = run.token_rewards
    names = (f.name for f in dataclasses.fields(settings) if f.name.startswith("teacher"))
    config = {name: getattr(settings, name) for name in names}
    inputs: list[Path | str] = ["pairs"]
    if settings.teacher == "model":
        inputs.append(rewards.teacher_folder(run))
    rewards.check_teacher(run)
    listed = [Stage("corrections", config, inputs, partial(rewards.correct, run))]
    if settings.kind != "edit":
        config = as_config(settings) | common
        base = settings.reward_model and resolve_model(settings.reward_model)
        inputs = [*([base] if base else run.start_inputs()), "pairs", "corrections"]
        listed.append(
            Stage("reward_model", config, inputs, partial(rewards.train_reward_model, run))
        )
    return listed


def _token_rewards_stage(run: AlloRun, common: dict[str, Any]) -> Stage:
    config = as_config(run.token_rewards) | common
    learned = ["reward_model"] if run.token_rewards.kind != "edit" else []
    inputs: list[Path | str] = [*run.start_inputs(), "pairs", "corrections", *learned]
    return Stage("token_rewards", config, inputs, partial(rewards.weigh, run))


def _evaluation_stages(run: AlloRun, base: Path, start: list[Path | str]) -> list[Stage]:
    """One stage a model of the table, so that none is evaluated twice."""
    models: dict[str, tuple[list[Path | str], Path, bool]] = {"base": ([base], base, False)}
    if run.sft.enabled:
        models["sft"] = (["sft"], run.start, False)
    models["dpo"] = (["warm_up"], run.output / "warm_up" / MODEL_FOLDER, False)
    models["allo"] = ([*start, "improve"], run.start, True)
    config = as_config(run.evaluate, run.machine)
    return [
        Stage(
            f"evaluate_{name}",
            config,
            [*inputs, "data"],
            evaluator(run, folder, has_delta=has_delta),
        )
        for name, (inputs, folder, has_delta) in models.items()
    ]


def allo(
    output: str = "runs/allo",
    model: str = ALIAS,
    data: DataSettings = DataSettings(),
    sft: SFTSettings = SFTSettings(),
    sample: SampleSettings = SampleSettings(),
    warm_up: DPOSettings = DPOSettings(),
    locate: LocateSettings = LocateSettings(),
    token_rewards: TokenRewardSettings = TokenRewardSettings(),
    forget: ForgetSettings = ForgetSettings(),
    improve: ImproveSettings = ImproveSettings(),
    evaluate: EvaluateSettings = EvaluateSettings(),
    run: RunSettings = RunSettings(),
    merge_model: bool = False,
) -> dict[str, Any]:
    """Run the whole ALLO pipeline; stages that are done are skipped.

    Args:
        output: folder of the run: a folder a stage, the exported mask and delta, the report.
        model: local folder, hub id or alias of the language model to align.
        data: which rows.
        sft: fine-tuning before anything else.
        sample: responses drawn from the model.
        warm_up: the full DPO run that shows which weights change.
        locate: how key neurons are found.
        token_rewards: which tokens of wrong responses are unaligned.
        forget: token-weighted NPO on N1.
        improve: DPO with the token filter on N2.
        evaluate: on the held-out rows.
        run: precision, device, seed.
        merge_model: also write start + delta as an ordinary model folder.

    Returns:
        The table's rows, by model.
    """
    pipeline = AlloRun(
        Path(output), model, data, sft, sample, warm_up, locate, token_rewards, forget, improve,
        evaluate, run, merge_model,
    )  # fmt: skip
    records = run_stages(stages_of(pipeline), output)
    return summarise(pipeline, records)
