"""ALPS, end to end (arXiv 2505.18799): which heads a task moves, and only those trained."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from lit_align.gguf_alias import ALIAS
from lit_align.pipelines.alps import stages as stages
from lit_align.pipelines.alps.run import TASK, ALPSRun
from lit_align.pipelines.alps.settings import (
    ALPSDataSettings,
    ALPSTrainSettings,
    CompareSettings,
    LocateHeadsSettings,
)
from lit_align.pipelines.alps.summary import summarise
from lit_align.pipelines.settings import RunSettings
from lit_align.pipelines.stage import Stage, run_stages
from lit_align.pipelines.training import as_config


def stages_of(run: ALPSRun) -> list[Stage]:
    """All stages, in order; each reads files and earlier stages alone."""
    files = [Path(file) for file in (*run.data.train_files, *run.data.validation_files)]
    config = as_config(run.data) | {"batch_size": run.train.batch_size}
    read = [run.base, *(file for file in files if file.exists())]  # else it is an id of the hub
    shared = {"objective": run.data.objective, "max_length": run.data.max_length}
    start: list[Path | str] = [run.base, "data"]
    machine = as_config(run.machine)
    listed = [
        Stage("data", config, read, partial(stages.prepare_rows, run)),
        Stage(
            "base",
            shared | machine | {"batch_size": run.train.batch_size},
            start,
            partial(stages.look_at_base, run),
        ),
    ]
    if run.fine_tunes:
        config = shared | machine | as_config(run.train)
        listed.append(Stage(TASK, config, start, partial(stages.fine_tune, run)))
    return [*listed, _heads_stage(run), *_tune_stages(run, shared)]


def _heads_stage(run: ALPSRun) -> Stage:
    source: Path | str = TASK if run.fine_tunes else run.task_dir
    if run.heads is not None:
        source = Path(run.heads)
    config = as_config(run.locate) | {"masks": [t.mask for t in run.tunings()]}
    return Stage("heads", config, [run.base, source], partial(stages.choose_heads, run))


def _tune_stages(run: ALPSRun, shared: dict[str, Any]) -> list[Stage]:
    """Every variant reads its own mask, so that a new one repeats no other."""
    listed = []
    for tuning in run.tunings():
        if tuning.stage == TASK:
            continue
        machine = dataclasses.replace(run.machine, seed=tuning.seed)
        config = shared | as_config(stages.train_settings(run, tuning.variant), machine)
        if tuning.variant == "lora":
            config |= as_config(run.compare.lora)
        if tuning.variant == "alps":
            config |= {"keep": run.compare.keep}
        masks = [] if tuning.mask is None else [run.mask(tuning.mask)]
        work = partial(stages.tune, run, tuning)
        listed.append(Stage(tuning.stage, config, [run.base, "data", *masks], work))
    return listed


def alps(
    output: str = "runs/alps",
    model: str = ALIAS,
    task_model: str | None = None,
    heads: str | None = None,
    data: ALPSDataSettings = ALPSDataSettings(),
    locate: LocateHeadsSettings = LocateHeadsSettings(),
    train: ALPSTrainSettings = ALPSTrainSettings(),
    compare: CompareSettings = CompareSettings(),
    run: RunSettings = RunSettings(),
) -> dict[str, Any]:
    """Find the attention heads that a task moves, and train only those of all heads.

    Stages that are done are skipped.

    Args:
        output: folder of the run: a folder a stage, the masks, the table, the report.
        model: local folder, hub id or alias of the base.
        task_model: likewise, of a model that was fine-tuned for the task already; without it the
            base is, on the rows.
        heads: file of a mask whose heads are trained on these rows, in place of locating any: so a
            set of heads is taken to another data set.
        data: rows to train and to compare on.
        locate: how heads are chosen, and whether the other weights train.
        train: every training.
        compare: baselines, and how often each variant is trained.
        run: precision, device, seed.

    Returns:
        What stands in `results.json`.
    """
    pipeline = ALPSRun(Path(output), model, task_model, heads, data, locate, train, compare, run)
    records = run_stages(stages_of(pipeline), output)
    return summarise(pipeline, records)
