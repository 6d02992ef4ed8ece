"""One ALPS run: its settings, its variants, and where its outputs stand."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from lit_align.errors import PipelineError
from lit_align.language_model import resolve_model
from lit_align.pipelines.alps.settings import (
    ALPSDataSettings,
    ALPSTrainSettings,
    CompareSettings,
    LocateHeadsSettings,
)
from lit_align.pipelines.run_folder import MODEL_FOLDER
from lit_align.pipelines.settings import RunSettings
from lit_align.pipelines.variants import TuneData

LABELS = {
    "full": "everything",
    "no_attention": "no attention head",
    "alps": "ALPS",
    "random": "random heads",
    "layer_consistent": "layer-consistent random heads",
    "lora": "LoRA on q, k and v",
}
DRAWN = ("random", "layer_consistent")  # the heads of these depend on the seed
TASK = "task"


@dataclasses.dataclass(frozen=True)
class Tuning:
    """One training of the table.

    Attributes:
        variant: a key of `LABELS`.
        seed: of the training, and of the heads where they are drawn.
        stage: where it stands.
        mask: name of its mask; None where everything trains, or adapters do.
    """

    variant: str
    seed: int
    stage: str
    mask: str | None


@dataclasses.dataclass(frozen=True)
class ALPSRun:
    """Settings of all stages; every stage is a function of a run and its own folder.

    Attributes:
        output: folder of the run; stage `x` writes into `output / "x"`.
        model: local folder, hub id or alias of the base.
        task_model: likewise, of the model that is already fine-tuned; None: fine-tune.
        heads: mask whose heads are taken; None: locate.
        data: rows.
        locate: how heads are chosen.
        train: every training.
        compare: the baselines.
        machine: precision, device, seed.

    Raises:
        PipelineError: settings that contradict each other.
    """

    output: Path
    model: str
    task_model: str | None
    heads: str | None
    data: ALPSDataSettings
    locate: LocateHeadsSettings
    train: ALPSTrainSettings
    compare: CompareSettings
    machine: RunSettings

    def __post_init__(self) -> None:
        if self.task_model is not None and self.heads is not None:
            raise PipelineError(
                "heads names heads that were chosen before, so task_model would not be looked at: "
                "give one of the two"
            )
        if "no_attention" in self.compare.baselines and not self._others_train:
            raise PipelineError(
                "without attention heads nothing trains where all other weights are frozen: leave "
                "no_attention out of compare.baselines, or set locate.others to train"
            )

    @property
    def _others_train(self) -> bool:
        return "train" in (self.locate.others, self.locate.o_proj)

    @property
    def base(self) -> Path:
        """The base's folder."""
        return resolve_model(self.model)

    @property
    def task_dir(self) -> Path:
        """The task model's folder."""
        if self.task_model is not None:
            return resolve_model(self.task_model)
        return self.output / TASK / MODEL_FOLDER

    @property
    def fine_tunes(self) -> bool:
        """Whether this run makes its own task model."""
        return self.task_model is None and self.heads is None

    def tune_data(self) -> TuneData:
        """The rows of the data stage."""
        files = {n: (str(self.output / "data" / f"{n}.jsonl"),) for n in ("train", "validation")}
        return dataclasses.replace(
            TuneData(files["train"], files["validation"]),
            max_length=self.data.max_length,
            objective=self.data.objective,
        )

    def mask(self, name: str) -> Path:
        """File of a mask."""
        return self.output / "heads" / f"{name}.safetensors"

    @property
    def seeds(self) -> list[int]:
        """Of the trainings of a variant."""
        return [self.machine.seed + i for i in range(self.compare.seeds)]

    def variants(self) -> list[str]:
        """Of the table, in its order."""
        return [name for name in LABELS if name == "alps" or name in self.compare.baselines]

    def tunings(self) -> Iterator[Tuning]:
        """Every training of the table; that of the task model is the first full one."""
        for variant in self.variants():
            for seed in self.seeds:
                name = f"{variant}_{seed}" if variant in DRAWN else variant
                whole = variant == "lora" or (variant == "full" and self.locate.others == "train")
                stage = f"tune_{variant}_{seed}"
                if variant == "full" and whole and self.fine_tunes and seed == self.machine.seed:
                    stage = TASK
                yield Tuning(variant, seed, stage, None if whole else name)
