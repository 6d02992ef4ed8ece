"""One training run inside a pipeline."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger

from lit_align.pipelines.settings import RunSettings, TrainSettings

CHATTER = ("GPU available", "TPU available", "HPU available", "💡 Tip", "`Trainer.fit` stopped")
MODULE_FIELDS = (
    "learning_rate", "weight_decay", "betas", "eps", "warmup_ratio", "lr_scheduler", "min_lr_ratio",
)  # fmt: skip


def module_settings(settings: TrainSettings, run: RunSettings) -> dict[str, Any]:
    """What a module takes of the settings of a run."""
    chosen = {name: getattr(settings, name) for name in MODULE_FIELDS}
    return chosen | {"gradient_checkpointing": run.gradient_checkpointing}


def data_settings(settings: TrainSettings, run: RunSettings, folder: Path) -> dict[str, Any]:
    """What a data module takes: sampled rows that cannot be used are written down, not fatal."""
    return {
        "batch_size": settings.batch_size,
        "max_length": settings.max_length,
        "layout": settings.layout,
        "max_tokens": settings.max_tokens,
        "seed": run.seed,
        "on_bad_row": "skip",
        "output_dir": str(folder),
    }


def train(
    module: lightning.LightningModule,
    data: lightning.LightningDataModule,
    settings: TrainSettings,
    run: RunSettings,
    folder: Path,
    callbacks: Sequence[lightning.Callback] = (),
) -> None:
    """Fit `module`, with metrics in `folder`; the trained model is then in `module.model`.

    A stage is done again from its beginning when it is killed, so it writes no checkpoint.
    """
    make_trainer(settings, run, folder, callbacks).fit(module, datamodule=data)


def make_trainer(
    settings: TrainSettings,
    run: RunSettings,
    folder: Path,
    callbacks: Sequence[lightning.Callback] = (),
    *,
    validate: bool = False,
) -> lightning.Trainer:
    """A Trainer for one run; with `validate` it looks at the validation rows after each epoch."""
    _leave_out_chatter()
    lightning.seed_everything(run.seed, verbose=False)
    return lightning.Trainer(
        default_root_dir=folder,
        accelerator=run.accelerator,
        devices=1,
        precision=run.precision,
        max_epochs=settings.epochs,
        max_steps=settings.max_steps,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=settings.gradient_clip or None,
        callbacks=list(callbacks),
        logger=CSVLogger(folder, name="", version="logs"),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=1.0 if validate else 0,
    )


def _leave_out_chatter() -> None:
    """A pipeline trains many times: what Lightning says of the machine each time is left out."""
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if _is_news not in log.filters:
        log.addFilter(_is_news)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # torch's pytree, in Lightning's code


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(CHATTER)


def inference_device(accelerator: str) -> torch.device:
    """Where a model is asked without training: the machine's accelerator, or `cpu` as named."""
    found = None if accelerator == "cpu" else torch.accelerator.current_accelerator(True)
    return found or torch.device("cpu")


def as_config(*settings: Any) -> dict[str, Any]:
    """Settings as what a stage's hash covers."""
    return {type(s).__name__: dataclasses.asdict(s) for s in settings}
