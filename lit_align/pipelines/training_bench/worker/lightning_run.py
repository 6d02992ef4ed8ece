"""lit-align's run: lightning.Trainer, MaskedDPO, PreferenceDataModule and a mask's file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.loggers import CSVLogger

from lit_align.callbacks import KeyParameterLocalization
from lit_align.compact import trainable
from lit_align.data import PreferenceDataModule
from lit_align.modules import MaskedDPO
from lit_align.pipelines.training_bench.job import Job, Result
from lit_align.pipelines.training_bench.worker.watch import Watch, state_bytes

LOG_EVERY_STEPS = 10  # TRL's default; Lightning's is 50


class PairsInOrder(PreferenceDataModule):
    """Trains in the order of the file: what is timed has to see the same batches as the others."""

    def train_dataloader(self) -> Any:
        """Batches of neighbouring rows."""
        return self.dataloader("train", self.batch_size, shuffle=False, group_by_length=False)


class TimedDPO(MaskedDPO):
    """Measures the pass of the reference, which the module makes before training."""

    watch: Watch

    def _attach_reference_logps(self, *args: Any) -> None:
        with self.watch.reference_pass():
            super()._attach_reference_logps(*args)


class StepEnds(lightning.Callback):
    """Tells the watch where steps end."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the first step."""
        self.watch.start()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """End a step: the loss is that of the window just done."""
        self.watch.step(pl_module.step_loss)


def run(job: Job, folder: Path, watch: Watch) -> Result:
    """Train, save a checkpoint, say what it took."""
    module, data, trainer = fit(job, folder, watch)
    checkpoint = None
    if job.saves:
        checkpoint = folder / "last.ckpt"
        trainer.save_checkpoint(checkpoint)
    return watch.result(
        trained_parameters=sum(p.numel() for _, p in trainable(module.model)),
        optimizer_bytes=state_bytes(trainer.optimizers[0]),
        checkpoint=checkpoint,
        reference_logps=[
            [float(s.ref_per_token_logps.astype("float64").sum()) for s in row.sequences]  # type: ignore[union-attr]
            for row in data.train_rows
        ],
        layout=data.layout,
    )


def fit(
    job: Job, folder: Path, watch: Watch
) -> tuple[MaskedDPO, PreferenceDataModule, lightning.Trainer]:
    """The run as `lit-align fit` makes it, with these settings."""
    module = TimedDPO(
        job.model,
        beta=job.beta,
        learning_rate=job.learning_rate,
        weight_decay=job.weight_decay,
        betas=job.betas,
        eps=job.eps,
        lr_scheduler="constant",
        warmup_ratio=0.0,
        gradient_checkpointing=job.checkpointing,
    )
    module.watch = watch
    data = PairsInOrder(
        job.model,
        train_file=job.pairs,
        batch_size=job.pairs_per_step,
        max_length=job.max_length,
        max_rows=job.num_pairs,
    )
    mask = [KeyParameterLocalization(mask=job.mask)] if job.mask else []
    trainer = lightning.Trainer(
        default_root_dir=folder,
        accelerator="gpu" if job.device == "cuda" else "cpu",
        devices=1,
        precision=job.precision,
        max_epochs=1,
        max_steps=job.steps,
        gradient_clip_val=job.gradient_clip,
        callbacks=[*mask, StepEnds(watch)],
        logger=CSVLogger(folder, name="", version="logs"),
        log_every_n_steps=LOG_EVERY_STEPS,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    return module, data, trainer
