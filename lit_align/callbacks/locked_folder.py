"""One run in a folder at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import lightning

from lit_align.errors import TrainingError
from lit_align.files import locked_folder


class LockedFolder(lightning.Callback):
    """Holds the run's folder while it trains: a second run in it is refused.

    `lit-align fit` has it where no `Checkpointing` does the same.
    """

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Lock the folder.

        Raises:
            TrainingError: another run works in it, or it cannot be made.
        """
        if stage == "fit":
            by_first_rank(trainer, lambda: self._hold(Path(trainer.default_root_dir).absolute()))

    def _hold(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(locked_folder(folder, TrainingError))
        except OSError as error:
            raise TrainingError(
                f"{folder}: the run cannot write there ({error.strerror}): choose another "
                "trainer.default_root_dir"
            ) from error

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


def by_first_rank(trainer: lightning.Trainer, act: Callable[[], None]) -> None:
    """Do something on the first rank; where it fails, it has failed on all: they would wait.

    Raises:
        TrainingError: it has.
    """
    problem = None
    if trainer.is_global_zero:
        try:
            act()
        except TrainingError as error:
            problem = str(error)
    if problem := trainer.strategy.broadcast(problem):
        raise TrainingError(problem)
