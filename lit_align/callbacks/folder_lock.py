"""One run in a folder, also where its checkpoints are not ours."""

from __future__ import annotations

import contextlib
from pathlib import Path

import lightning
from lightning import Callback

from lit_align.errors import TrainingError
from lit_align.files import locked_folder


class FolderLock(Callback):
    """Locks the run's folder: a second run in it is refused. `Checkpointing` does so itself."""

    def __init__(self) -> None:
        """Nothing is locked before the run begins."""
        self._held = contextlib.ExitStack()

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Lock the folder.

        Raises:
            TrainingError: another run works in it, or it cannot be written to.
        """
        problem = None
        if stage == "fit" and trainer.is_global_zero:
            root = Path(trainer.default_root_dir).absolute()
            try:
                root.mkdir(parents=True, exist_ok=True)
                self._held.enter_context(locked_folder(root, TrainingError))
            except (TrainingError, OSError) as error:
                problem = str(error)
        if problem := trainer.strategy.broadcast(problem):  # the others would wait for the first
            raise TrainingError(problem)

    def teardown(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Let go of the folder."""
        self._held.close()

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        """Let go of the folder."""
        self._held.close()
