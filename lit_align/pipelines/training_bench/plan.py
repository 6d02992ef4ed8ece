"""The stages of a comparison: pairs, masks, proofs, rounds."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Any

from lit_align.errors import BenchmarkError
from lit_align.language_model import resolve_model
from lit_align.pipelines.stage import Stage
from lit_align.pipelines.training_bench import launch
from lit_align.pipelines.training_bench.job import Job
from lit_align.pipelines.training_bench.methods import (
    INSTALL,
    METHODS,
    WARM_UP,
    Method,
    mask_file,
)
from lit_align.pipelines.training_bench.pairs import PAIRS_FILE, write_pairs
from lit_align.pipelines.training_bench.settings import BenchSettings

PAIRS, MASKS = "pairs", "masks"
OURS_FOLLOWED = "full"
FOLLOWED = ("trl-precomputed", "torch")  # the first that is installed; both know the reference's
PACKAGES = ("torch", "transformers", "lightning", "trl", "peft", "accelerate")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        settings: of the command.
        output: folder of the stages.
        methods: measured, in turns.
        left_out: method → why it is not measured.
    """

    settings: BenchSettings
    output: Path
    methods: list[Method]
    left_out: dict[str, str]

    @classmethod
    def of(cls, settings: BenchSettings) -> Plan:
        """Find out what is installed.

        Raises:
            BenchmarkError: nothing is left to measure, or a mask is missing.
        """
        chosen = [METHODS[name] for name in settings.methods]
        left_out = {m.name: f"needs {', '.join(m.missing)}: {INSTALL}" for m in chosen if m.missing}
        methods = [m for m in chosen if not m.missing]
        if not methods:
            raise BenchmarkError(f"none of {', '.join(left_out)} can run here: {INSTALL}")
        if settings.masks is not None:
            for method in methods:
                path = None if method.mask is None else Path(settings.masks, mask_file(method.mask))
                if path is not None and not path.is_file():
                    raise BenchmarkError(f"{method.name} needs {path}, which is not there")
        return cls(settings, Path(settings.output), methods, left_out)

    @property
    def rival(self) -> Method | None:
        """Whose log-probs and losses lit-align's are compared with; None: not asked for."""
        found = (METHODS[name] for name in FOLLOWED)
        return next((m for m in found if not m.missing), None) if self.settings.follow else None

    def preparation(self) -> list[Stage]:
        """Pairs, and masks where a method needs them and none are given."""
        stages = [self._pairs_stage()]
        if self.settings.masks is None and any(m.mask for m in self.methods):
            stages.append(self._worker_stage(MASKS, WARM_UP, self.settings.mask_steps))
        return stages

    def proofs(self) -> dict[str, Stage]:
        """Method → the run that is followed."""
        if self.rival is None:
            return {}
        followed = (METHODS[OURS_FOLLOWED], self.rival)
        steps = self.settings.follow
        return {m.name: self._worker_stage(f"follow-{m.name}", m, steps) for m in followed}

    def rounds(self) -> list[tuple[int, Method, Stage]]:
        """Every measurement, methods in turns; the first round saves checkpoints."""
        s = self.settings
        return [
            (r, m, self._worker_stage(f"round{r}-{m.name}", m, s.warmup_steps + s.steps, r == 1))
            for r in range(1, s.rounds + 1)
            for m in self.methods
        ]

    def folder(self, stage: Stage) -> Path:
        """Where a stage's outputs stand."""
        return self.output / stage.name

    @property
    def pairs_path(self) -> Path:
        """The pairs, once their stage is done."""
        return self.output / PAIRS / PAIRS_FILE

    def _pairs_stage(self) -> Stage:
        s = self.settings
        model = resolve_model(s.model)
        return Stage(
            name=PAIRS,
            config={
                "pairs": s.num_pairs,
                "max_length": s.max_length,
                "chat_template": s.chat_template,
            },
            inputs=[Path(s.data), model],
            run=lambda folder: write_pairs(s, folder),
        )

    def _worker_stage(self, name: str, method: Method, steps: int, saves: bool = False) -> Stage:
        job = self._job(method, steps, saves)
        config: dict[str, Any] = dataclasses.asdict(job) | {"versions": versions()}
        inputs: list[Path | str] = [PAIRS]
        for key in ("model", "pairs", "mask"):  # as inputs they count by their bytes
            config.pop(key)
        if method.mask is not None:
            inputs.append(MASKS if self.settings.masks is None else Path(str(job.mask)))
        return Stage(name, config, inputs, run=lambda folder: launch.launch(job, folder))

    def _job(self, method: Method, steps: int, saves: bool) -> Job:
        s = self.settings
        masks = self.output / MASKS if s.masks is None else Path(s.masks)
        return Job(
            method=method.name,
            model=str(resolve_model(s.model)),
            pairs=str(self.pairs_path),
            steps=steps,
            pairs_per_step=s.pairs_per_step,
            max_length=s.max_length,
            learning_rate=s.learning_rate,
            threads=s.threads,
            device=s.device,
            mask=None if method.mask is None else str(masks / mask_file(method.mask)),
            saves=saves,
            checkpointing=method.checkpointing,
        )


def versions() -> dict[str, str]:
    """Of the packages that are measured, where they are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
