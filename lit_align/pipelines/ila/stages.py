"""The stages of ILA: each a function of the run and of the folder it writes into."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning

from lit_align.callbacks import KeepMilestones, StopWhenStable
from lit_align.localizers.layer_gate import LayerScores, layer_gate_mask, read_scores
from lit_align.masks import ParameterMask
from lit_align.masks.compare import Comparison, compare_masks
from lit_align.masks.transfer import transfer_scores
from lit_align.modules import ILAMaskLearning
from lit_align.pipelines.ila.data import Layers
from lit_align.pipelines.ila.run import SCORES_FILE, TRANSFERRED, ILARun
from lit_align.pipelines.ila.variants import Choice, choices, orders
from lit_align.pipelines.rows import write_json
from lit_align.pipelines.settings import TrainSettings
from lit_align.pipelines.training import make_trainer
from lit_align.pipelines.variants import Variant, data_module, train_variant, validation_loss

OVERLAP_FILE = "overlap.json"
TRANSFER_FILE = "transfer.json"
STABILITY_FILE = "stability.json"


def find_change(run: ILARun, dataset: str, folder: Path) -> None:
    """Stage 1: fine-tune all layers until the training is stable, or to its milestones."""
    settings = run.stage1
    callback: lightning.Callback
    if settings.until == "milestones":
        callback = KeepMilestones(settings.milestones, str(folder / "milestones"))
    else:
        callback = StopWhenStable(settings.epsilon, settings.window)
    train_variant(
        str(run.base),
        run.search_data(dataset),
        Variant(dataset, adapter=settings.adapter_of(settings.method)),
        settings.of_method(settings.method),
        run.machine,
        folder,
        [callback],
        keep="nothing" if settings.until == "milestones" else "change",
    )


def stability_file(run: ILARun, dataset: str) -> Path:
    """What stage 1 says of its stability."""
    return run.output / f"change_{dataset}" / STABILITY_FILE


def learn_scores(run: ILARun, dataset: str, milestone: str, folder: Path) -> None:
    """Stage 2: what each layer's change is worth."""
    settings = run.stage2
    data = run.search_data(dataset)
    train = TrainSettings(
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        max_steps=settings.batches,
        gradient_clip=0.0,
    )
    rows = data_module(data, str(run.base), train, run.machine, folder)
    epochs = math.ceil(settings.batches / len(rows.train_dataloader()))
    module = ILAMaskLearning(
        str(run.base),
        str(run.change(dataset, milestone)),
        loss=run.data.objective,
        initial_score=settings.initial_score,
        budget=settings.budget,
        budget_weight=settings.budget_weight,
        optimizer=settings.optimizer,
        learning_rate=settings.learning_rate,
        gradient_checkpointing=run.machine.gradient_checkpointing,
        scores=str(folder / SCORES_FILE),
    )
    trainer = make_trainer(dataclasses.replace(train, epochs=epochs), run.machine, folder)
    trainer.fit(module, datamodule=rows)


# ---- from rankings to masks ------------------------------------------------------------------


def choose_layers(run: ILARun, folder: Path) -> None:
    """A mask for each variant, and how much the rankings agree."""
    layers = Layers.read(run)
    found = {name: read_scores(ranking.file) for name, ranking in run.rankings().items()}
    if run.use.transfer:
        found[TRANSFERRED] = _transferred(run.use.transfer, layers, folder)
    scores: dict[str, Any] = found | orders(layers.names, run.machine.seed)
    for choice in choices(run):
        if choice.rankings:
            mask = choice.mask(scores, layers.shapes, layers.base_fingerprint)
            mask.save(folder / f"{choice.name}.safetensors")
    compared = {"rankings": found} | {
        f"milestones of {dataset}": {r.name: read_scores(r.file) for r in rankings}
        for dataset, rankings in run.found().items()
    }
    overlaps = {
        title: dataclasses.asdict(overlap(several, layers, run.use.compare_share))
        for title, several in compared.items()
        if len(several) > 1
    }
    write_json(folder / OVERLAP_FILE, overlaps)


def overlap(rankings: Mapping[str, LayerScores], layers: Layers, share: float) -> Comparison:
    """Jaccard indices of the rankings' top layers, beside those of random rankings."""
    tops = {
        name: layer_gate_mask(
            scores, layers.shapes, share, base_fingerprint=layers.base_fingerprint
        )
        for name, scores in rankings.items()
    }
    return compare_masks(tops, "layer", layers=layers.names)


def _transferred(file: str, layers: Layers, folder: Path) -> LayerScores:
    """The other architecture's scores on this model's layers; what did not fit is written down."""
    theirs = read_scores(file)
    moved = transfer_scores(theirs.layers, layers.names, theirs.unscored)
    write_json(folder / TRANSFER_FILE, dataclasses.asdict(moved))
    return dataclasses.replace(
        theirs, layers=moved.scores, base_fingerprint=layers.base_fingerprint
    )


def tune(run: ILARun, choice: Choice, seed: int, folder: Path) -> None:
    """Train one variant and measure it."""
    mask = mask_file(run, choice)
    variant = Variant(
        choice.name,
        mask=ParameterMask.load(mask) if mask else None,
        adapter=run.use.adapter_of(choice.method),
    )
    machine = dataclasses.replace(run.machine, seed=seed)
    train = run.use.of_method(choice.method)
    train_variant(str(run.base), run.tune_data(), variant, train, machine, folder)


def mask_file(run: ILARun, choice: Choice) -> Path | None:
    """The mask of a variant; None where everything trains."""
    folder = run.output / "masks"
    return folder / f"{choice.name}.safetensors" if choice.rankings else None


def look_at_base(run: ILARun, folder: Path) -> None:
    """The validation loss of the model as it is."""
    validation_loss(str(run.base), run.tune_data(), run.use, run.machine, folder)
