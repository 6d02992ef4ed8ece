"""TRL's DPOTrainer, alone and with adapters of peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
import trl
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback

from lit_align.language_model import load_language_model
from lit_align.pipelines.training_bench.job import Job, Result
from lit_align.pipelines.training_bench.worker.pair_file import read_pairs
from lit_align.pipelines.training_bench.worker.watch import Watch, state_bytes

RANK = 32  # ILA's LoRA; SHiRA trains as many entries. Tiny models: a quarter of their width


class InOrder(trl.DPOTrainer):
    """DPOTrainer on given token ids: no tokenising, no shuffling; the rest is TRL's."""

    watch: Watch
    step_loss: torch.Tensor

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(rows)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Keep the step's loss for the watch."""
        self.step_loss = super().training_step(*args, **kwargs)
        return self.step_loss

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Dataset:
        with self.watch.reference_pass():
            return super()._precompute_ref_logps(*args, **kwargs)


class StepEnds(TrainerCallback):
    """Tells the watch where steps end."""

    def __init__(self, trainer: InOrder) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the first step."""
        self.trainer.watch.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End a step."""
        self.trainer.watch.step(self.trainer.step_loss)


def run(job: Job, folder: Path, watch: Watch) -> Result:
    """Train, save a checkpoint as the trainer does, say what it took."""
    dtype = torch.bfloat16 if job.precision == "bf16-true" else torch.float32
    model, tokenizer = load_language_model(job.model, dtype=dtype)
    InOrder.watch = watch  # its constructor runs the reference
    trainer: Any = InOrder(
        model=model,
        args=_config(job, folder),
        train_dataset=Dataset.from_list(read_pairs(job)),
        processing_class=tokenizer,
        peft_config=_adapter(job.method, min(RANK, model.config.hidden_size // 4)),
    )
    trainer.add_callback(StepEnds(trainer))
    trainer.train()
    checkpoint = None
    if job.saves:
        trainer._save_checkpoint(trainer.model, None)
        (checkpoint,) = folder.glob("checkpoint-*")
    logps = None
    if job.method == "trl-precomputed":
        columns = (trainer.train_dataset[f"ref_{side}_logps"] for side in ("chosen", "rejected"))
        logps = [list(map(float, pair)) for pair in zip(*columns, strict=True)]
    return watch.result(
        trained_parameters=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        optimizer_bytes=state_bytes(trainer.optimizer),
        checkpoint=checkpoint,
        reference_logps=logps,
        trl=trl.__version__,
        peft=peft.__version__,
    )


def _config(job: Job, folder: Path) -> trl.DPOConfig:
    """The job's settings; the others are TRL's defaults, but precision and what is recomputed."""
    return trl.DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=job.pairs_per_step,
        max_steps=job.steps,
        max_length=job.max_length,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        beta=job.beta,
        adam_beta1=job.betas[0],
        adam_beta2=job.betas[1],
        adam_epsilon=job.eps,
        weight_decay=job.weight_decay,
        max_grad_norm=job.gradient_clip,
        precompute_ref_log_probs=job.method == "trl-precomputed",
        bf16=job.precision != "32-true",
        gradient_checkpointing=job.checkpointing is True,
        use_cpu=job.device == "cpu",
        dataloader_pin_memory=job.device != "cpu",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def _adapter(method: str, rank: int) -> peft.PeftConfig | None:
    """Adapters on every linear layer but the head, which TRL does not train."""
    common: dict[str, Any] = {"r": rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if method == "trl-lora":
        return peft.LoraConfig(lora_alpha=2 * rank, lora_dropout=0.0, **common)
    return peft.ShiraConfig(**common) if method == "trl-shira" else None
