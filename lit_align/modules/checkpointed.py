"""What a checkpoint of every module holds: the trainable entries, and whose they are."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from transformers import PreTrainedModel

from lit_align.checkpoint_content import is_count, is_seed
from lit_align.checkpoint_file import load_sound
from lit_align.compact import load_trainable, trainable
from lit_align.compact.adapters import AdapterSettings, adapter_identity
from lit_align.compact.rank_allocation import (
    allocates_ranks,
    allocation_state,
    load_allocation_state,
)
from lit_align.errors import TrainingError
from lit_align.modules.logged import LoggedModule
from lit_align.modules.metric_log import Throughput
from lit_align.modules.resuming import begin_at_step, check_place, seed_batch
from lit_align.modules.sharded_reading import read_whole
from lit_align.modules.sharded_saving import verify_checkpoints
from lit_align.shards import local

CHECKPOINT_KEY = "lit_align"
RANKS = "rank_allocation"  # in it: what AdaLoRA's has learnt
PREFIX = "language_model."  # of the model's parameters in a module's state


class CheckpointedModule(LoggedModule):
    """Holds a language model, of which checkpoints keep what trains."""

    def __init__(self) -> None:
        super().__init__()
        self.language_model: PreTrainedModel | None = None
        self.delta_checksum: str | None = None  # of the delta that the run starts from
        self.run_seed: int | None = None  # a resumed run goes on with the first one's
        self._ends_later = False  # resumed, and what training's end writes is still to come
        self._stepped = 0  # steps before the accumulation window under way
        self._counted_at_step = copy.copy(self.throughput)  # what had been counted before it

    def setup(self, stage: str) -> None:
        """Have checkpoints written whole and verified, unless the user brings a plugin."""
        verify_checkpoints(self.trainer.strategy, self._check_identity)
        if stage == "fit":  # a module may be fitted again, in a notebook
            self.throughput, self.run_seed, self._ends_later = Throughput(), None, False
            self._counted_at_step = copy.copy(self.throughput)
            self._stepped = self.logged_step = 0

    def on_fit_start(self) -> None:
        """Refuse to train where ranks have read different checkpoints, or only some read one.

        Raises:
            TrainingError: the folder is not the same on all machines.
        """
        strategy = self.trainer.strategy
        first = strategy.broadcast(self._stepped)
        if strategy.reduce_boolean_decision(first != self._stepped, all=False):
            raise TrainingError(
                f"the first rank goes on after step {first}, and another one does not: checkpoints "
                "have to lie in a folder that all machines share (trainer.default_root_dir)"
            )

    def on_train_start(self) -> None:
        """In an epoch that is gone on with, Lightning does not ask for its accumulation again."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GradientAccumulationScheduler):
                callback.on_train_epoch_start(self.trainer, self)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Random numbers depend on the place alone, so that a resumed run draws the same."""
        seed_batch(self._seed(), self.current_epoch, batch_idx, self.global_rank)

    def _seed(self) -> int:
        if self.run_seed is None:
            self.run_seed = self.trainer.strategy.broadcast(torch.initial_seed())
        return self.run_seed

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write the log where it is due; after a step a new accumulation window begins."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self.global_step > self._stepped:
            self._stepped, self._counted_at_step = self.global_step, copy.copy(self.throughput)

    def on_train_end(self) -> None:
        """Write what is left of the log."""
        self._ends_later = False
        super().on_train_end()

    def on_fit_end(self) -> None:
        """A run that is resumed behind its last step has its end all the same: files come of it."""
        if self._ends_later:
            self.trainer.fit_loop.on_run_end()

    @property
    def model(self) -> PreTrainedModel:
        """The language model, once it is loaded."""
        if self.language_model is None:
            raise TrainingError("the model is loaded in configure_model: call it first")
        return self.language_model

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The trainable entries alone; the base is named by its fingerprint."""
        return {PREFIX + name: p.detach() for name, p in trainable(self.model)}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load trainable entries and write them into the weights.

        Raises:
            TrainingError: names or shapes are not those of what trains here.
        """
        load_trainable(self.model, {n.removeprefix(PREFIX): t for n, t in state_dict.items()})
        return torch.nn.modules.module._IncompatibleKeys([], [])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the base, the mask, the delta and the adapters that the entries belong to.

        Raises:
            TrainingError: an entry is NaN or infinite, or not there: nobody could go on from it.
        """
        self._check_entries_are_there(checkpoint["state_dict"])
        self._check_finite_entries(checkpoint["state_dict"])
        moved = begin_at_step(checkpoint, self.trainer)  # what came since will come again
        done = self._counted_at_step if moved else self.throughput
        seen_tokens = done.seen_tokens + done.tokens_since_log(self.device)
        kept = {"seen_tokens": seen_tokens, "run_seed": self._seed()}
        checkpoint[CHECKPOINT_KEY] = self._identity() | kept
        if allocates_ranks(self.model):
            checkpoint[CHECKPOINT_KEY][RANKS] = allocation_state(self.model)
        settings = checkpoint.get("hyper_parameters", {})
        if isinstance(settings.get("adapter"), AdapterSettings):  # not with `weights_only`
            settings["adapter"] = dataclasses.asdict(settings["adapter"])

    def _check_entries_are_there(self, entries: Mapping[str, torch.Tensor]) -> None:
        # A strategy that gathers them into one file does so on the first rank alone.
        first = self.trainer.is_global_zero
        missing = sorted(self.state_dict().keys() - entries.keys()) if first else []
        if self.trainer.strategy.reduce_boolean_decision(bool(missing), all=False):
            one = f", {missing[0]} for one" if missing else ""
            raise TrainingError(
                "no checkpoint is written: a callback (WeightAveraging?) has put something else in "
                f"the place of what trains{one}; leave that callback out"
            )

    def _check_finite_entries(self, entries: Mapping[str, torch.Tensor]) -> None:
        bad = [n for n, t in entries.items() if not local(t).isfinite().all()]
        if not self.trainer.strategy.reduce_boolean_decision(bool(bad), all=False):
            return
        where = f", first in {bad[0].removeprefix(PREFIX)}" if bad else ""
        raise TrainingError(
            f"trained values are not finite after step {self.global_step}{where}: no checkpoint is "
            "written, and the last one is as it was; lower the learning rate"
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base, mask, delta or adapter.

        Raises:
            TrainingError: names both.
        """
        self._check_identity(checkpoint)
        check_place(checkpoint, self.trainer)
        theirs = checkpoint[CHECKPOINT_KEY]
        if allocates_ranks(self.model):
            load_allocation_state(self.model, theirs[RANKS])
        self.run_seed, self._ends_later = theirs.get("run_seed"), True
        self.throughput.seen_tokens = int(theirs.get("seen_tokens", 0))
        self._counted_at_step = copy.copy(self.throughput)
        self._stepped = self.logged_step = int(checkpoint["global_step"])

    def _check_identity(self, checkpoint: Mapping[str, Any]) -> None:
        theirs = checkpoint.get(CHECKPOINT_KEY)
        if (
            not isinstance(theirs, dict)
            or not is_count(theirs.get("seen_tokens", 0))
            or not is_seed(theirs.get("run_seed"))
        ):
            raise TrainingError(f"not a checkpoint of lit-align: of it, it says {theirs!r:.200}")
        for what, value in self._identity().items():
            if theirs.get(what) != value:
                raise TrainingError(
                    f"the checkpoint has {what} {theirs.get(what)}, this run {value}: it belongs "
                    "to another run"
                )

    def _identity(self) -> dict[str, Any]:
        return {
            "base_fingerprint": getattr(self.model, "base_fingerprint", None),
            "mask_digest": None if self.mask is None else self.mask.digest,
            "delta_checksum": self.delta_checksum,
            "adapter": adapter_identity(self.model),
        }


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of a module with its settings, its tensors mapped from the file.

    Those of a folder of shards are put together; the optimiser's state is left out.

    Raises:
        TrainingError: the file or folder is no checkpoint, or damaged.
    """
    path = Path(path)
    checkpoint = read_whole(path) if path.is_dir() else load_sound(path)
    if "hyper_parameters" not in checkpoint:
        raise TrainingError(f"{path}: not a checkpoint of a module, or damaged")
    return checkpoint
