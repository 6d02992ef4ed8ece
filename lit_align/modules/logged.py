"""What every module logs, and when."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning

from lit_align.masks import ParameterMask
from lit_align.modules.metric_log import MetricLog, Throughput, log_everywhere


class LoggedModule(lightning.LightningModule):
    """Logs the means of `reported_names`, throughput and memory, right over windows and ranks.

    Training is logged every `log_every_n_steps` optimiser steps, under TRL's names.
    """

    reported_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self.mask: ParameterMask | None = None
        # Not submodules: bf16-true would cast their sums.
        self.logs = {s: MetricLog(self.reported_names) for s in ("train", "val", "test")}
        self.throughput = Throughput()
        self.logged_step = 0

    def log_of(self, split: str) -> MetricLog:
        """Where a split's values go: train, val or test."""
        return self.logs[split].to(self.device)

    def trained_share(self) -> float:
        """Trained parameters as a share of the base's."""
        return self.mask.density() if self.mask is not None else 1.0

    def logs_next_step(self) -> bool:
        """Whether the step under way will be logged."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and (self.global_step + 1) % every == 0

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write the log where a step was taken that is due."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        step = self.global_step
        if step > self.logged_step and every > 0 and step % every == 0:
            values = self._flush()
            self.log_dict({n: float(v) for n, v in values.items() if n != "loss"}, logger=False)

    def on_train_end(self) -> None:
        """Write what has come since the last log."""
        if self.global_step > self.logged_step:
            self._flush()

    def _flush(self) -> dict[str, float]:
        self.logged_step = self.global_step
        values = self.log_of("train").compute_and_reset()
        values |= self.throughput.compute_and_reset(self.device)
        values["mask/density"] = self.trained_share()
        values["learning_rate"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        log_everywhere(self.loggers, values, self.global_step)
        return values

    def on_validation_epoch_end(self) -> None:
        """Log the means under TRL's names with `eval_` in front."""
        self._log_split("val", "eval_")

    def on_test_epoch_end(self) -> None:
        """Log the means with `test_` in front."""
        self._log_split("test", "test_")

    def _log_split(self, split: str, prefix: str) -> None:
        values = self.log_of(split).compute_and_reset()
        named = {prefix + n: v for n, v in values.items()}
        # They are of all ranks already: of equal values the largest is each.
        self.log_dict(named, prog_bar=False, sync_dist=True, reduce_fx="max")
