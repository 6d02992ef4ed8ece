"""ILA, end to end (arXiv 2410.17875): what changes, which layers matter, and only those trained."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from lit_align.gguf_alias import ALIAS
from lit_align.pipelines.ila import data as data_stages
from lit_align.pipelines.ila import stages as stages
from lit_align.pipelines.ila.run import LAST, ILARun
from lit_align.pipelines.ila.settings import (
    ILADataSettings,
    Stage1Settings,
    Stage2Settings,
    UseSettings,
)
from lit_align.pipelines.ila.summary import summarise
from lit_align.pipelines.ila.variants import choices
from lit_align.pipelines.settings import RunSettings
from lit_align.pipelines.stage import Stage, run_stages
from lit_align.pipelines.training import as_config


def stages_of(run: ILARun) -> list[Stage]:
    """All stages, in order; each reads files and earlier stages alone."""
    files = [Path(file) for file in (*run.files.values(), *run.data.validation_files)]
    batches = {s.group: s.batch_size for s in (run.stage1, run.stage2, run.use)}
    return [
        Stage(
            "data",
            as_config(run.data) | batches,
            [run.base, *(file for file in files if file.exists())],  # else it is an id of the hub
            partial(data_stages.prepare_rows, run),
        ),
        Stage(
            "layers",
            {"changes": run.stage1.change, "nf4": run.use.method == "qlora"},
            [run.base],
            partial(data_stages.list_layers, run),
        ),
        *_search_stages(run),
        _mask_stage(run),
        *_tune_stages(run),
    ]


def _search_stages(run: ILARun) -> list[Stage]:
    """Stages 1 and 2 of every data set."""
    listed = []
    machine = as_config(run.machine) | {"objective": run.data.objective}
    for dataset, rankings in run.found().items():
        rows = [Path(file) for file in run.search_data(dataset).train_files]
        inputs: list[Path | str] = [run.base, *rows]
        changed: list[Path | str] = [f"change_{dataset}"]
        if dataset not in run.fine_tuned:
            changed = [run.change(dataset, LAST)]
        else:
            work = partial(stages.find_change, run, dataset)
            listed.append(Stage(f"change_{dataset}", as_config(run.stage1) | machine, inputs, work))
        config = dataclasses.asdict(run.stage2) | machine
        del config["milestones"]  # which of them are ranked changes no ranking
        for milestone, ranking in zip(run.asked(), rankings, strict=True):
            work = partial(stages.learn_scores, run, dataset, milestone)
            assert ranking.stage is not None
            listed.append(Stage(ranking.stage, config, [*inputs, *changed], work))
    return listed


def _mask_stage(run: ILARun) -> Stage:
    inputs: list[Path | str] = ["layers", *(r.stage or r.file for r in run.every_ranking())]
    inputs += [Path(run.use.transfer)] if run.use.transfer else []
    config = {
        "variants": [dataclasses.asdict(choice) for choice in choices(run)],
        "compare_share": run.use.compare_share,
        "seed": run.machine.seed,
    }
    return Stage("masks", config, inputs, partial(stages.choose_layers, run))


def _tune_stages(run: ILARun) -> list[Stage]:
    """The base, and every variant: each reads its own mask, so that a new one repeats no other."""
    data = run.tune_data()
    rows = [Path(file) for file in (*data.train_files, *data.validation_files)]
    shared = {"objective": data.objective, "max_length": data.max_length}
    listed = [
        Stage(
            "base",
            shared | {"batch_size": run.use.batch_size} | as_config(run.machine),
            [run.base, *rows],
            partial(stages.look_at_base, run),
        )
    ]
    for choice in choices(run):
        mask = stages.mask_file(run, choice)
        adapter = run.use.adapter_of(choice.method)
        config = shared | as_config(run.use.of_method(choice.method))
        config["adapter"] = adapter and dataclasses.asdict(adapter)
        for i, folder in enumerate(run.tune_folders(choice.name)):
            seed = run.machine.seed + i
            machine = as_config(dataclasses.replace(run.machine, seed=seed))
            inputs = [run.base, *rows, *([mask] if mask else [])]
            work = partial(stages.tune, run, choice, seed)
            listed.append(Stage(folder.name, config | machine, inputs, work))
    return listed


def ila(
    output: str = "runs/ila",
    model: str = ALIAS,
    data: ILADataSettings = ILADataSettings(),
    stage1: Stage1Settings = Stage1Settings(),
    stage2: Stage2Settings = Stage2Settings(),
    use: UseSettings = UseSettings(),
    run: RunSettings = RunSettings(),
) -> dict[str, Any]:
    """Rank a model's linear layers by what their change is worth, and train the important ones.

    Stages that are done are skipped.

    Args:
        output: folder of the run: a folder a stage, the masks, the table, the report.
        model: local folder, hub id or alias of the language model.
        data: rows to fine-tune on, and to find the layers with.
        stage1: the fine-tuning whose change is looked at.
        stage2: the gates that rank the layers.
        use: what is trained with the ranking, and what it is compared with.
        run: precision, device, seed.

    Returns:
        What stands in `results.json`.
    """
    pipeline = ILARun(Path(output), model, data, stage1, stage2, use, run)
    records = run_stages(stages_of(pipeline), output)
    return summarise(pipeline, records)
