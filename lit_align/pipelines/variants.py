"""Train one variant of a model, with a mask, an adapter or neither, and measure it.

The comparisons of ILA and ALPS are lists of variants that differ in nothing but what trains.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning

from lit_align.callbacks import KeyParameterLocalization
from lit_align.compact import trainable
from lit_align.compact.adapters import AdapterSettings, has_adapters, merge_adapters
from lit_align.compact.change import save_change
from lit_align.data import PreferenceDataModule, SFTDataModule
from lit_align.errors import PipelineError
from lit_align.language_model import save_language_model
from lit_align.masks import ParameterMask
from lit_align.modules import LanguageModelModule, MaskedDPO, SupervisedFineTuning
from lit_align.peak_memory import PeakMemory
from lit_align.pipelines.rows import write_json
from lit_align.pipelines.run_folder import MODEL_FOLDER
from lit_align.pipelines.setting_checks import LENGTH, NOT_NEGATIVE, SHARE, check
from lit_align.pipelines.settings import RunSettings, TrainSettings
from lit_align.pipelines.training import data_settings, make_trainer, module_settings

Keep = Literal["nothing", "change", "model"]
MASK_FILE = "mask.safetensors"
CHANGE_FOLDER = "change"


@dataclasses.dataclass(frozen=True)
class TuneData:
    """Rows to fine-tune on.

    Attributes:
        train_files: files that the data modules read; of several, all rows.
        validation_files: likewise; none: `validation_fraction` of the train rows.
        validation_fraction: see `validation_files`.
        max_rows: use the first so many usable rows of each split; 0: all.
        max_length: most tokens of prompt and response.
        objective: `sft` (responses to learn) or `dpo` (preference pairs).
        chat_template: in place of the tokenizer's own: `transcript` (Human/Assistant, for base
            models), a file's path, or the Jinja text.
        seed: of the split into train and validation rows.
    """

    train_files: tuple[str, ...] = ()
    validation_files: tuple[str, ...] = ()
    validation_fraction: float = 0.1
    max_rows: int = 0
    max_length: int = 1024
    objective: Literal["sft", "dpo"] = "sft"
    chat_template: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        check("data", self, validation_fraction=SHARE, max_rows=NOT_NEGATIVE, max_length=LENGTH)


@dataclasses.dataclass(frozen=True)
class Variant:
    """What trains.

    Attributes:
        name: of the row in the table.
        mask: entries that train; with an adapter the layers that get one; None: everything.
        adapter: LoRA and its kin, in place of the weights.
    """

    name: str
    mask: ParameterMask | None = None
    adapter: AdapterSettings | None = None


class TrainingClock(lightning.Callback):
    """Seconds spent in training steps, validation left out, and the step of the last validation."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.validated_step = -1
        self._start = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Start."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Add."""
        self.seconds += time.perf_counter() - self._start

    def on_validation_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Note how far training was."""
        self.validated_step = trainer.global_step


def data_module(
    data: TuneData, model: str, train: TrainSettings, run: RunSettings, folder: Path
) -> SFTDataModule | PreferenceDataModule:
    """The data module over the rows, loaded; rows are split by `data.seed`, shuffled by `run.seed`.

    Raises:
        DataError: a split without a usable row.
        PipelineError: no files.
    """
    if not data.train_files:
        raise PipelineError("data.train_files is empty: name at least one file")
    kind = SFTDataModule if data.objective == "sft" else PreferenceDataModule
    settings = data_settings(train, run, folder) | {
        "max_length": data.max_length,
        "chat_template": data.chat_template,
        "seed": data.seed,
        "max_rows": data.max_rows or None,
        "validation_fraction": 0.0 if data.validation_files else data.validation_fraction,
    }
    module = kind(model, list(data.train_files), list(data.validation_files) or None, **settings)
    module.setup("fit")
    module.seed = run.seed
    return module


def training_module(
    model: str, data: TuneData, train: TrainSettings, run: RunSettings, **options: Any
) -> LanguageModelModule:
    """The module of the data's objective."""
    kind = SupervisedFineTuning if data.objective == "sft" else MaskedDPO
    return kind(model, **module_settings(train, run), **options)


def train_variant(
    model: str,
    data: TuneData,
    variant: Variant,
    train: TrainSettings,
    run: RunSettings,
    folder: Path,
    callbacks: Sequence[lightning.Callback] = (),
    keep: Keep = "nothing",
) -> dict[str, Any]:
    """Train one variant and measure it.

    Args:
        model: local folder, hub id or alias to start from.
        data: rows; the validation rows give the loss that variants are compared by.
        variant: what trains.
        train: the training run; its `max_length` gives way to `data.max_length`.
        run: precision, device, seed.
        folder: gets `metrics.json`, `logs/`, the mask, and what `keep` asks for.
        callbacks: of the training run.
        keep: `change` writes `change/` (see `save_change`), `model` an ordinary model folder.

    Returns:
        What stands in `metrics.json`: name, seed, validation_loss at the end (mean nats a token
        for SFT, the DPO loss a pair otherwise), train_loss of the last step, steps,
        trained_parameters, seconds of training, tokens, peak_rss_mib, train_rows and
        validation_rows.
    """
    rows = data_module(data, model, train, run, folder)
    clock = TrainingClock()
    used = [*callbacks, clock]
    if variant.mask is not None:
        variant.mask.save(folder / MASK_FILE)
        used.append(KeyParameterLocalization(mask=str(folder / MASK_FILE)))
    module = training_module(model, data, train, run, adapter=variant.adapter)
    trainer = make_trainer(train, run, folder, used, validate=rows.has_rows("validation"))
    with PeakMemory() as peak:
        trainer.fit(module, datamodule=rows)
    train_loss = _metric(trainer, "loss")
    if rows.has_rows("validation") and clock.validated_step != trainer.global_step:
        trainer.validate(module, datamodule=rows, verbose=False)  # max_steps ended amid an epoch
    if keep == "change":
        save_change(module.model, folder / CHANGE_FOLDER)
    elif keep == "model":
        if has_adapters(module.model):
            merge_adapters(module.model)
        save_language_model(module.model, module.tokenizer, folder / MODEL_FOLDER)  # type: ignore[arg-type]
    metrics = {
        "name": variant.name,
        "seed": run.seed,
        "validation_loss": _metric(trainer, "eval_loss"),
        "train_loss": train_loss,
        "steps": trainer.global_step,
        "trained_parameters": sum(p.numel() for _, p in trainable(module.model)),
        "seconds": round(clock.seconds, 3),
        "tokens": module.throughput.seen_tokens,
        "peak_rss_mib": None if peak.mib is None else round(peak.mib, 1),
        "train_rows": len(rows.rows("train")),
        "validation_rows": len(rows.rows("validation")) if rows.has_rows("validation") else 0,
    }
    write_json(folder / "metrics.json", metrics)
    return metrics


def _metric(trainer: lightning.Trainer, name: str) -> float | None:
    value = trainer.callback_metrics.get(name)
    return None if value is None or not math.isfinite(value) else float(value)


def validation_loss(
    model: str, data: TuneData, train: TrainSettings, run: RunSettings, folder: Path
) -> dict[str, Any]:
    """The validation loss of a model as it is: the first row of a table of variants."""
    rows = data_module(data, model, train, run, folder)
    module = training_module(model, data, train, run)
    trainer = make_trainer(train, run, folder, [], validate=True)
    trainer.validate(module, datamodule=rows, verbose=False)
    metrics = {
        "name": "base",
        "validation_loss": _metric(trainer, "eval_loss"),
        "validation_rows": len(rows.rows("validation")),
        "trained_parameters": 0,
    }
    write_json(folder / "metrics.json", metrics)
    return metrics
