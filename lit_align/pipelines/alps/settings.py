"""Settings of `lit-align alps`: frozen dataclasses, each field an option of the command line."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, TypeAlias

from lit_align.compact.adapters import AdapterSettings
from lit_align.errors import PipelineError
from lit_align.localizers import HeadDistance
from lit_align.pipelines.setting_checks import COUNT, POSITIVE, RATIO, Rule, check
from lit_align.pipelines.settings import TrainSettings
from lit_align.pipelines.variants import Keep, TuneData

Baseline: TypeAlias = Literal["full", "no_attention", "random", "layer_consistent", "lora"]
BASELINES: tuple[Baseline, ...] = ("full", "no_attention", "random", "layer_consistent", "lora")
DISTINCT = Rule(lambda x: len(set(x)) == len(x), "given once each")


@dataclasses.dataclass(frozen=True)
class ALPSDataSettings(TuneData):
    """Rows that the task model and every variant are trained on.

    They are split into train and validation rows once, so that no head is chosen by a validation
    row.
    """

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check("data", self, train_files=DISTINCT, validation_files=DISTINCT)
        if not self.validation_files and not self.validation_fraction:
            raise PipelineError(
                "variants are compared by validation loss: give data.validation_files, or a "
                "data.validation_fraction above 0"
            )


@dataclasses.dataclass(frozen=True)
class LocateHeadsSettings(HeadDistance):
    """Which heads are chosen, and what trains beside them.

    Attributes:
        ratio: share of all query heads.
    """

    ratio: float = 0.1

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check("locate", self, ratio=RATIO)


@dataclasses.dataclass(frozen=True)
class ALPSTrainSettings(TrainSettings):
    """The training of the task model and of every variant, with the paper's settings of AdamW.

    The paper's batch is 128 rows: `batch_size` times `accumulate`.
    """

    group: ClassVar[str] = "train"

    learning_rate: float = 2e-5
    epochs: int = 3
    weight_decay: float = 0.1
    min_lr_ratio: float = 0.1


@dataclasses.dataclass(frozen=True)
class CompareSettings:
    """What the chosen heads are compared with.

    Attributes:
        baselines: `full` (everything trains; with `locate.others: freeze` all heads do),
            `no_attention` (no head), `random` (as many heads, by chance), `layer_consistent` (the
            same number of random heads in every block), `lora` (of q, k and v; all else frozen).
        seeds: trainings of each variant, from `run.seed` on, each with random heads of its own.
        lora: rank, alpha and dropout of that baseline.
        lora_learning_rate: its peak.
        keep: of the model that the chosen heads make: its `change` (a delta), the whole `model`, or
            `nothing`.
    """

    group: ClassVar[str] = "compare"

    baselines: tuple[Baseline, ...] = BASELINES
    seeds: int = 1
    lora: AdapterSettings = AdapterSettings(rank=128, alpha=256.0)
    lora_learning_rate: float = 2e-4
    keep: Keep = "change"

    def __post_init__(self) -> None:
        """Check the values."""
        check(self.group, self, baselines=DISTINCT, seeds=COUNT, lora_learning_rate=POSITIVE)
        decided = AdapterSettings()
        for name in ("kind", "layers", "mask"):
            if getattr(self.lora, name) != getattr(decided, name):
                raise PipelineError(
                    f"compare.lora.{name} is not for you to set: the baseline is LoRA on q, k and v"
                )
