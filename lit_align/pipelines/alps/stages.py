"""The stages of ALPS: each a function of the run and of the folder it writes into."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lit_align.errors import DataError, MaskError
from lit_align.language_model import fingerprint
from lit_align.localizers.head_distance import SCORES
from lit_align.localizers.stored import meta_model
from lit_align.masks import HeadLayout, ParameterMask
from lit_align.masks.head_sets import (
    Heads,
    OtherWeights,
    attention_shares,
    head_set_mask,
    layer_consistent_heads,
    random_heads,
)
from lit_align.pipelines.alps.run import ALPSRun, Tuning
from lit_align.pipelines.rows import as_ids, write_json, write_jsonl
from lit_align.pipelines.settings import TrainSettings
from lit_align.pipelines.variants import (
    Variant,
    data_module,
    train_variant,
    validation_loss,
)

HEADS_FILE = "heads.json"


def prepare_rows(run: ALPSRun, folder: Path) -> None:
    """Tokenise and split the rows once; they are written as token ids.

    Raises:
        DataError: there are fewer train rows than in a batch.
    """
    rows = data_module(run.data, str(run.base), run.train, run.machine, folder)
    found = len(rows.rows("train"))
    if found < run.train.batch_size:
        raise DataError(
            f"{', '.join(run.data.train_files)}: {found} train row(s), less than one batch of "
            f"train.batch_size {run.train.batch_size}: give more rows, or a smaller batch"
        )
    for split in ("train", "validation"):
        write_jsonl(folder / f"{split}.jsonl", map(as_ids, rows.rows(split)))


def fine_tune(run: ALPSRun, folder: Path) -> None:
    """The task model: everything trains."""
    data, settings = run.tune_data(), train_settings(run, "full")
    variant = Variant("full")
    train_variant(str(run.base), data, variant, settings, run.machine, folder, keep="model")


def look_at_base(run: ALPSRun, folder: Path) -> None:
    """The validation loss of the base as it is."""
    validation_loss(str(run.base), run.tune_data(), run.train, run.machine, folder)


def choose_heads(run: ALPSRun, folder: Path) -> None:
    """The chosen heads' mask, and those of the baselines.

    Raises:
        LocalizationError: base and task model cannot be compared, or hardly differ.
        MaskError: the model's heads cannot be told apart, or a given mask is another model's or
            has no whole head.
    """
    model: Any = meta_model(run.base)
    layout = HeadLayout.from_model(model)
    chosen = _located(run) if run.heads is None else _given(run, layout, model)
    heads = chosen.metadata.extra["heads"]
    count = sum(map(len, heads.values()))
    masks = {"alps": chosen}
    sets: dict[str, Heads] = {
        "no_attention": {},
        "full": {str(i): range(layout.num_heads) for i in range(len(layout.blocks))},
    }
    for seed in run.seeds:
        sets[f"random_{seed}"] = random_heads(layout, count, seed)
        sets[f"layer_consistent_{seed}"] = layer_consistent_heads(layout, count, seed)
    for tuning in run.tunings():
        if tuning.mask in sets:
            masks[tuning.mask] = _head_set(run, layout, model, sets[tuning.mask], tuning.variant)
    for name, mask in masks.items():
        mask.save(folder / f"{name}.safetensors")
    write_json(folder / HEADS_FILE, _described(layout, masks))


def _located(run: ALPSRun) -> ParameterMask:
    scores = run.locate.scores(run.base, run.task_dir)
    return run.locate.select(run.base, run.task_dir, scores, run.locate.ratio)


def _given(run: ALPSRun, layout: HeadLayout, model: Any) -> ParameterMask:
    """The heads of a mask, which another run located, with this run's other weights."""
    given = ParameterMask.load(str(run.heads))
    given.check_matches(model, fingerprint(run.base))
    heads = layout.chosen_heads(given.selections)
    if not any(heads.values()):
        raise MaskError(f"{run.heads} selects no whole attention head (q rows)")
    mask = _head_set(run, layout, model, heads, given.metadata.method)
    kept = ("head_scores", "representation", "metric", "tau", "task_fingerprint")
    extra = {name: given.metadata.extra[name] for name in kept if name in given.metadata.extra}
    extra |= mask.metadata.extra
    return ParameterMask(mask.selections, dataclasses.replace(mask.metadata, extra=extra))


def _head_set(
    run: ALPSRun, layout: HeadLayout, model: Any, heads: Heads, method: str
) -> ParameterMask:
    return head_set_mask(
        layout,
        heads,
        model,
        OtherWeights(run.locate.others, run.locate.o_proj),
        method=method,
        base_fingerprint=fingerprint(run.base),
    )


def _described(layout: HeadLayout, masks: dict[str, ParameterMask]) -> dict[str, Any]:
    """What the table says of the heads of each mask, and the scores where there are any."""
    extra = masks["alps"].metadata.extra
    return {
        "num_heads": layout.num_heads,
        "num_kv_heads": layout.num_kv_heads,
        "total_heads": layout.total_heads,
        "blocks": [layout.block_number(i) for i in range(len(layout.blocks))],
        "projections": list(dict.fromkeys(p.name for b in layout.blocks for p in b)),
        "scores": extra.get(SCORES),
        "masks": {
            name: {
                "heads": mask.metadata.extra["heads"],
                "count": sum(map(len, mask.metadata.extra["heads"].values())),
                "shares": attention_shares(layout, mask),
            }
            for name, mask in masks.items()
        },
    }


def tune(run: ALPSRun, tuning: Tuning, folder: Path) -> None:
    """Train one variant and measure it."""
    mask = None if tuning.mask is None else ParameterMask.load(run.mask(tuning.mask))
    adapter = None
    if tuning.variant == "lora":
        layout = HeadLayout.from_model(meta_model(run.base))
        names = dict.fromkeys(p.name for block in layout.blocks for p in block)
        adapter = dataclasses.replace(run.compare.lora, layers=list(names))
    train_variant(
        str(run.base),
        run.tune_data(),
        Variant(tuning.variant, mask, adapter),
        train_settings(run, tuning.variant),
        dataclasses.replace(run.machine, seed=tuning.seed),
        folder,
        keep=run.compare.keep if tuning.variant == "alps" else "nothing",
    )


def train_settings(run: ALPSRun, variant: str) -> TrainSettings:
    """The training run of a variant: adapters have a learning rate of their own."""
    if variant != "lora":
        return run.train
    return dataclasses.replace(run.train, learning_rate=run.compare.lora_learning_rate)
