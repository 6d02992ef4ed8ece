"""Settings of `lit-align ila`: frozen dataclasses, each field an option of the command line."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal, TypeAlias

from lit_align.compact.adapters import AdapterSettings
from lit_align.errors import PipelineError
from lit_align.modules.ila_mask_learning import ScoreOptimizer
from lit_align.pipelines.setting_checks import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    RATIO,
    Rule,
    check,
)
from lit_align.pipelines.settings import TrainSettings
from lit_align.pipelines.variants import TuneData

Method: TypeAlias = Literal["full", "lora", "qlora", "adalora"]
Baseline: TypeAlias = Literal["full", "all", "random", "first", "last", "adalora"]
BASELINES: tuple[Baseline, ...] = ("full", "all", "random", "first", "last", "adalora")

RATIOS = Rule(
    lambda x: all(RATIO.holds(v) for v in x) and len(set(x)) == len(x),
    "shares in (0, 1], given once each",
)
FRACTIONS = Rule(
    lambda x: all(0 < v < 1 for v in x) and len(set(x)) == len(x),
    "shares in (0, 1), given once each",
)
RISING = Rule(
    lambda x: len(x) > 0 and RATIOS.holds(x) and list(x) == sorted(set(x)),
    "shares in (0, 1] that rise",
)
FINITE = Rule(math.isfinite, "a finite number")
BUDGET = Rule(lambda x: x is None or RATIO.holds(x), "in (0, 1]")
DISTINCT = Rule(lambda x: len(set(x)) == len(x), "given once each")


@dataclasses.dataclass(frozen=True)
class ILADataSettings(TuneData):
    """Rows to fine-tune on, and rows to find the layers with.

    A file is split into train and validation rows once, so that no ranking sees a validation row.

    Attributes:
        max_rows: use the first so many usable rows of each file; 0: all.
        search_files: each file is a data set of its own that the layers are ranked on; none: the
            train files together are the one data set.
    """

    search_files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check("data", self, train_files=DISTINCT, search_files=DISTINCT)
        if not self.validation_files and not self.validation_fraction:
            raise PipelineError(
                "variants are compared by validation loss: give data.validation_files, or a "
                "data.validation_fraction above 0"
            )


@dataclasses.dataclass(frozen=True)
class AdapterTrainSettings(TrainSettings):
    """A fine-tuning of whole weights or of adapters, with the paper's settings of AdamW.

    Attributes:
        learning_rate: peak, of adapters.
        full_learning_rate: peak where whole weights train.
        max_length: leave it: `data.max_length` is the limit of every training.
        adapter: rank, alpha, dropout, and what AdaLoRA takes; which layers get one, which kind it
            is and whether the weights are quantised is decided elsewhere.
    """

    learning_rate: float = 2e-4
    full_learning_rate: float = 1e-5
    epochs: int = 3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    warmup_ratio: float = 0.01
    adapter: AdapterSettings = AdapterSettings()

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check(self.group, self, full_learning_rate=POSITIVE)
        if self.max_length != TrainSettings.max_length:
            raise PipelineError(f"set data.max_length in place of {self.group}.max_length")
        decided = AdapterSettings()
        for name in ("kind", "layers", "mask", "quantization"):
            if getattr(self.adapter, name) != getattr(decided, name):
                raise PipelineError(
                    f"{self.group}.adapter.{name} is not for you to set: {self.group}.method and "
                    "the ranking decide it"
                )

    def of_method(self, method: Method) -> TrainSettings:
        """The training run, with the learning rate of whole weights where those train."""
        rate = self.full_learning_rate if method == "full" else self.learning_rate
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(TrainSettings)}
        return TrainSettings(**values | {"learning_rate": rate})

    def adapter_of(self, method: Method) -> AdapterSettings | None:
        """The adapters that a method trains; None where whole weights train."""
        if method == "full":
            return None
        return dataclasses.replace(
            self.adapter,
            kind="adalora" if method == "adalora" else "lora",
            quantization="nf4" if method == "qlora" else "none",
        )


@dataclasses.dataclass(frozen=True)
class Stage1Settings(AdapterTrainSettings):
    """What changes: a fine-tuning of all layers.

    Attributes:
        enabled: without it nothing is searched: rankings come from `use.scores` or `use.transfer`.
        method: `lora` on every linear layer and the head, or `full`.
        until: stop when the training is ε-stable (`stable`), or train on to the end and keep the
            change at each milestone (`milestones`).
        epsilon: ε of `stable`: the largest change of the mean training loss a step, in nats.
        window: steps of that mean; it takes three windows to see that a training is stable.
        milestones: shares of the steps at which the change is kept.
        change: folders of changes made before (adapters, a delta or a fine-tuned model), one for
            each data set, in place of training.
    """

    group: ClassVar[str] = "stage1"

    enabled: bool = True
    method: Literal["lora", "full"] = "lora"
    until: Literal["stable", "milestones"] = "stable"
    epsilon: float = 0.01
    window: int = 20
    milestones: tuple[float, ...] = (0.01, 0.25, 0.5, 0.75, 1.0)
    change: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check(self.group, self, epsilon=POSITIVE, window=COUNT, milestones=RISING)


@dataclasses.dataclass(frozen=True)
class Stage2Settings:
    """How important each layer's change is: gates are learned, everything else is frozen.

    Attributes:
        milestones: those of stage 1 to rank at; none: the last.
        initial_score: s_0 of every layer; its gate is σ(s_0).
        batches: so many steps of one batch, over the rows as often as that takes.
        batch_size: rows of a batch.
        optimizer: of the scores: `gradient_descent` (the paper's) or `adamw`.
        learning_rate: of the scores.
        budget: H, as a share of the layers, that ‖γ‖ is held below by a penalty; none: no penalty.
        budget_weight: of the penalty.
    """

    group: ClassVar[str] = "stage2"

    milestones: tuple[float, ...] = ()
    initial_score: float = 4.0
    batches: int = 128
    batch_size: int = 8
    optimizer: ScoreOptimizer = "gradient_descent"
    learning_rate: float = 100.0
    budget: float | None = None
    budget_weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the values."""
        check(
            self.group,
            self,
            milestones=DISTINCT,
            batches=COUNT,
            batch_size=COUNT,
            initial_score=FINITE,
            learning_rate=POSITIVE,
            budget=BUDGET,
            budget_weight=NOT_NEGATIVE,
        )


@dataclasses.dataclass(frozen=True)
class UseSettings(AdapterTrainSettings):
    """What is made of the ranking: variants that train some layers, and baselines.

    Attributes:
        method: how the chosen layers train: `full`, `lora`, or `qlora` (adapters on weights that
            are quantised to NF4).
        top: train only these shares of the layers, the most important ones.
        freeze: freeze these shares, the least important ones.
        baselines: `full` (every parameter), `all` (every layer, by `method`), `random` (two
            draws), `first` and `last` (freeze so many layers), `adalora` (of every layer).
        baseline_freeze: the shares that random, first and last freeze.
        seeds: trainings of each variant, from `run.seed` on.
        scores: files of rankings of this model that were found before.
        transfer: file of a ranking of another architecture.
        compare_share: rankings are compared by the overlap of their top layers, of this share.
    """

    group: ClassVar[str] = "use"

    method: Literal["full", "lora", "qlora"] = "lora"
    top: tuple[float, ...] = (0.1, 0.2, 0.3)
    freeze: tuple[float, ...] = (0.25,)
    baselines: tuple[Baseline, ...] = BASELINES
    baseline_freeze: tuple[float, ...] = (0.25,)
    seeds: int = 1
    scores: tuple[str, ...] = ()
    transfer: str | None = None
    compare_share: float = 0.75

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check(
            self.group,
            self,
            top=RATIOS,
            freeze=FRACTIONS,
            baselines=DISTINCT,
            baseline_freeze=FRACTIONS,
            seeds=COUNT,
            scores=DISTINCT,
            compare_share=RATIO,
        )
