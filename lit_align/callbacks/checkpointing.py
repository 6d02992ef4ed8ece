"""Checkpoints that a run of any length can go on from, and how it ends when it is told to."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_align.callbacks.locked_folder import by_first_rank
from lit_align.checkpoint_file import SUFFIX, newest_sound
from lit_align.errors import TrainingError
from lit_align.files import locked_folder, remove_partial_files, write_atomically

SIGTERM_STATUS = 128 + signal.SIGTERM  # what shells report: nothing that follows takes it for done


class Checkpointing(ModelCheckpoint):
    """Keeps the newest checkpoints; `lit-align fit` has it unless another is configured.

    - One is taken after a step every `minutes`, every `every_n_train_steps` where that is set, and
      at the end of each epoch. Those before the newest `keep` are removed.
    - `ckpt_path: last` goes on from the newest whose checksums hold, and says which did not.
    - SIGTERM: one more is taken, inside an accumulation window too, and the run ends with status
      143. Under SLURM it is `hpc_ckpt_N.ckpt`, from which Lightning goes on by itself, and the
      signal for requeueing is answered between two batches, never amid a step.
    - The run's folder is locked: a second run in it is refused.

    Lightning's own handlers save at once, wherever the run stands, or not at all.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        *,
        minutes: float = 10.0,
        every_n_train_steps: int | None = None,
        keep: int = 2,
    ) -> None:
        """When to save, and where.

        Args:
            dirpath: folder; default `checkpoints` in the run's folder.
            minutes: time between two checkpoints.
            every_n_train_steps: optimiser steps between two, besides.
            keep: how many stay; with 1 there is none to fall back to where the last is damaged.

        Raises:
            TrainingError: one of them is not positive.
        """
        if not (minutes > 0 and keep >= 1 and (every_n_train_steps or 1) >= 1):
            raise TrainingError(
                f"minutes {minutes}, every_n_train_steps {every_n_train_steps} and keep {keep} of "
                "Checkpointing must be positive"
            )
        super().__init__(dirpath, "{step}", monitor="step", mode="max", save_top_k=keep)
        self.minutes, self.every_n_steps = minutes, every_n_train_steps
        self._last_saved = time.monotonic()
        self._came: dict[int, bool] = {}  # signals answered between batches; whether each came
        self._theirs: dict[int, Any] = {}  # and how Lightning would have answered
        self._held = contextlib.ExitStack()  # the folder's lock

    # ---- the folder --------------------------------------------------------------------------

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Lock the folder, and see that checkpoints can be written.

        Raises:
            TrainingError: another run works in it, or it cannot be written to.
        """
        self.dirpath = str(self._folder(trainer))
        root, folder = Path(trainer.default_root_dir).absolute(), Path(self.dirpath)
        if stage == "fit":
            by_first_rank(trainer, lambda: self._take_folder(root, folder))
        super().setup(trainer, pl_module, stage)

    def _take_folder(self, root: Path, checkpoints: Path) -> None:
        try:
            for folder in dict.fromkeys((root, checkpoints)):
                folder.mkdir(parents=True, exist_ok=True)
                if folder == root or root not in folder.parents:
                    self._held.enter_context(locked_folder(folder, TrainingError))
            remove_partial_files(checkpoints, f"*{SUFFIX}.*")  # of killed runs
            probe = checkpoints / ".writable"
            write_atomically(probe, b"")
            probe.unlink()
        except OSError as error:
            self._held.close()
            raise TrainingError(
                f"{checkpoints}: checkpoints cannot be written there ({error.strerror}): choose "
                "another trainer.default_root_dir"
            ) from error

    def teardown(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Let go of the folder."""
        super().teardown(trainer, pl_module, stage)
        self._held.close()

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        """Let go of the folder; a run that SIGTERM ended is not taken for one that is done."""
        self._held.close()
        if isinstance(exception, SIGTERMException):  # Lightning's own, too
            exception.code = SIGTERM_STATUS

    def _folder(self, trainer: lightning.Trainer) -> Path:
        return Path(self.dirpath or Path(trainer.default_root_dir) / "checkpoints").absolute()

    def _find_last_checkpoints(self, trainer: lightning.Trainer) -> set[str]:
        """What `ckpt_path: last` chooses from: the newest sound one, SLURM's among them.

        Raises:
            TrainingError: there are some, and all are damaged.
        """
        root, folder = Path(trainer.default_root_dir), self._folder(trainer)
        found = [*folder.glob(f"*{SUFFIX}"), *root.glob(f"hpc_ckpt_*{SUFFIX}")]
        there = [path for path in found if path.exists()]
        if there and (newest := newest_sound(there)) is None:
            raise TrainingError(
                f"{folder}: every checkpoint is damaged or cannot be read: bring one back, or move "
                "them away to begin anew"
            )
        return {str(newest)} if there else set()

    # ---- when to save ------------------------------------------------------------------------

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Start the clock; a resumed run's first checkpoint is that of its next step."""
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step
        self._last_saved = time.monotonic()
        self._answer_signals_between_batches()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save where it is due, and answer the signals that have come."""
        on_any_rank = trainer.strategy.reduce_boolean_decision
        asked = any(self._came.values())
        if not on_any_rank(asked or self._is_due(trainer), all=False):
            return
        self._answer(trainer)
        if on_any_rank(self._is_due(trainer), all=False):
            self._save(trainer)

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Answer the signals that have come: a validation may take longer than the time left.

        On several ranks they wait for its end: one may have a batch more than another.
        """
        in_fit = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if in_fit and trainer.world_size == 1 and any(self._came.values()):
            self._answer(trainer)

    def _answer(self, trainer: lightning.Trainer) -> None:
        on_any_rank = trainer.strategy.reduce_boolean_decision
        # All ranks do the same: which of them the signal reached says nothing.
        came = [number for number in self._came if on_any_rank(self._came[number], all=False)]
        self._came = dict.fromkeys(self._came, False)
        for number in came:
            if number != signal.SIGTERM:
                self._theirs[number](number, None)  # saves, and has the job queued again
        if signal.SIGTERM in came:
            self._save_and_end(trainer)

    def _is_due(self, trainer: lightning.Trainer) -> bool:
        """Whether a step was taken since the last checkpoint, and it is time."""
        step = trainer.global_step
        if self._should_skip_saving_checkpoint(trainer):
            return False
        by_step = self.every_n_steps is not None and step % self.every_n_steps == 0
        return by_step or time.monotonic() - self._last_saved > 60 * self.minutes

    def _should_remove_checkpoint(
        self, trainer: lightning.Trainer, previous: str, current: str
    ) -> bool:
        """The one that the run went on from, too: Lightning would keep one for every resumption."""
        return previous != current and Path(str(self.dirpath)) in Path(previous).parents

    def _save(self, trainer: lightning.Trainer) -> None:
        self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        self._last_saved = time.monotonic()

    # ---- signals -----------------------------------------------------------------------------

    def _answer_signals_between_batches(self) -> None:
        """Take over from Lightning's handlers, which it registers before and takes away after."""
        if threading.current_thread() is not threading.main_thread():
            return
        numbers = {signal.SIGTERM}
        if SLURMEnvironment.detect() and (requeue := SLURMEnvironment().requeue_signal):
            numbers.add(requeue)
        self._theirs = {n: signal.getsignal(n) for n in sorted(numbers)}
        self._came = {n: False for n, theirs in self._theirs.items() if callable(theirs)}
        for number in self._came:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self._came[number] = True

    def _save_and_end(self, trainer: lightning.Trainer) -> None:
        if SLURMEnvironment.detect():
            path = trainer._checkpoint_connector.hpc_save_path(str(trainer.default_root_dir))
            trainer.save_checkpoint(path)
            if trainer.is_global_zero:
                found = Path(trainer.default_root_dir).glob(f"hpc_ckpt_*{SUFFIX}")
                for old in sorted(found, key=lambda p: p.stat().st_mtime_ns)[: -self.save_top_k]:
                    trainer.strategy.remove_checkpoint(old)
        elif not self._should_skip_saving_checkpoint(trainer):
            self._save(trainer)
        step = trainer.global_step
        said = f"is saved at step {step}" if step else "had done no step"
        rank_zero_info(f"SIGTERM: the run {said} and ends")
        raise SIGTERMException
