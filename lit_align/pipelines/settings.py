"""Settings of the pipelines: frozen dataclasses, each field an option of the command line.

Each checks its values when it is made and raises a PipelineError that names the option.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from lit_align.data.shared_prefix import Layout
from lit_align.errors import PipelineError
from lit_align.losses import DPOLossType
from lit_align.losses.token_filter import FilterSide
from lit_align.masks.select import Granularity, Scope
from lit_align.modules.activation_checkpointing import GradientCheckpointing
from lit_align.pipelines.rewards.endpoint_request import check_url
from lit_align.pipelines.setting_checks import (
    BETAS,
    COUNT,
    FRACTION,
    LENGTH,
    NOT_NEGATIVE,
    POSITIVE,
    RATIO,
    SCHEDULER,
    SHARE,
    SMOOTHING,
    STEPS,
    check,
)

DROPPED = 0.1  # the paper's share of noisy tokens
DataKind = Literal["word_problems", "questions", "preference"]


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Which rows.

    Attributes:
        kind: `word_problems` (the embedded generator), `questions` (rows with an answer that can
            be checked: `final_answer`, or `choices` and `answer_index`) or `preference` (pairs:
            sampling is skipped).
        train_files: JSONL, JSON, Parquet or CSV files; none for word problems.
        held_out_files: likewise; none: every `held_out_every`-th row of the train files.
        train_rows: use so many (0: all), taken evenly from the files; of word problems, make so
            many (at least 1).
        held_out_rows: likewise.
        held_out_every: see `held_out_files`.
        seed: of the generator, and of the order of the rows.
        on_bad_row: stop before training, or skip bad rows and write them to
            `data/rejected_rows.jsonl`.
    """

    kind: DataKind = "word_problems"
    train_files: tuple[str, ...] = ()
    held_out_files: tuple[str, ...] = ()
    train_rows: int = 200
    held_out_rows: int = 100
    held_out_every: int = 4
    seed: int = 0
    on_bad_row: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        """Check the values."""
        check("data", self, train_rows=NOT_NEGATIVE, held_out_rows=NOT_NEGATIVE)


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """One training run.

    Attributes:
        learning_rate: peak.
        epochs: over the rows.
        batch_size: rows of one forward and backward.
        accumulate: such batches of one step.
        weight_decay: decoupled, on trained entries alone.
        betas: of AdamW.
        eps: of AdamW.
        warmup_ratio: share of the steps with linear warm-up.
        lr_scheduler: a name of transformers: linear, cosine, cosine_with_restarts, polynomial,
            constant, constant_with_warmup or inverse_sqrt.
        min_lr_ratio: of `cosine`: the share of the peak that it ends at.
        gradient_clip: largest norm of the gradient; 0 for none.
        max_length: most tokens of prompt and response.
        layout: of the batches: `shared_prefix` (packed, a pair's prompt once) or `padded`; None:
            pairs are packed, other rows padded.
        max_tokens: of a packed batch, in place of `batch_size`.
        max_steps: stop after so many; -1 for none.
    """

    group: ClassVar[str] = "train"  # what the options begin with

    learning_rate: float = 1e-6
    epochs: int = 1
    batch_size: int = 8
    accumulate: int = 1
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup_ratio: float = 0.1
    lr_scheduler: str = "cosine"
    min_lr_ratio: float = 0.0
    gradient_clip: float = 1.0
    max_length: int = 1024
    layout: Layout | None = None
    max_tokens: int | None = None
    max_steps: int = -1

    def __post_init__(self) -> None:
        """Check the values."""
        check(
            self.group,
            self,
            learning_rate=POSITIVE,
            epochs=COUNT,
            batch_size=COUNT,
            accumulate=COUNT,
            weight_decay=NOT_NEGATIVE,
            betas=BETAS,
            eps=POSITIVE,
            warmup_ratio=SHARE,
            lr_scheduler=SCHEDULER,
            min_lr_ratio=SHARE,
            gradient_clip=NOT_NEGATIVE,
            max_length=LENGTH,
            max_steps=STEPS,
        )


@dataclasses.dataclass(frozen=True)
class SFTSettings(TrainSettings):
    """Supervised fine-tuning on the train rows' right responses, first of all.

    Attributes:
        enabled: without it the given model is what everything starts from.
    """

    group: ClassVar[str] = "sft"

    enabled: bool = True
    learning_rate: float = 2e-5
    epochs: int = 2


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """Responses drawn from the model for the train rows.

    Attributes:
        num_samples: a question.
        temperature: > 0.
        top_p: nucleus.
        max_new_tokens: of a response.
        pairs_per_prompt: most pairs of correct × wrong responses of one question.
        wrong_per_prompt: most wrong responses of one question that are to be forgotten; 0: all.
        gold_as_chosen: where no sampled response is right, the row's own right response is the
            better one of the pair.
        batch_size: sequences generated at a time.
        seed: of the draws.
    """

    num_samples: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 48
    pairs_per_prompt: int = 5
    wrong_per_prompt: int = 0
    gold_as_chosen: bool = True
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        check(
            "sample",
            self,
            num_samples=COUNT,
            temperature=POSITIVE,
            top_p=RATIO,
            max_new_tokens=COUNT,
            pairs_per_prompt=COUNT,
            wrong_per_prompt=NOT_NEGATIVE,
            batch_size=COUNT,
        )


@dataclasses.dataclass(frozen=True)
class DPOSettings(TrainSettings):
    """A DPO run (the warm-up is one).

    Attributes:
        beta: strength of the pull towards the reference.
        loss_type: sigmoid, hinge, ipo or robust.
        label_smoothing: share of labels taken to be wrong.
    """

    group: ClassVar[str] = "warm_up"

    beta: float = 0.1
    loss_type: DPOLossType = "sigmoid"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check(self.group, self, beta=POSITIVE, label_smoothing=SMOOTHING)


@dataclasses.dataclass(frozen=True)
class LocateSettings:
    """How key neurons are found; one score gives both masks, so the smaller is inside the larger.

    Attributes:
        method: `weight_change` (the paper's, from the warm-up), `gradient` (of the DPO loss at θ),
            `random` or `magnitude`.
        forget_ratio: share of N1.
        improve_ratio: share of N2.
        granularity: element, row, head or layer.
        scope: rank globally or inside each parameter.
        num_batches: for `gradient`.
        seed: for `random`.
    """

    method: Literal["weight_change", "gradient", "random", "magnitude"] = "weight_change"
    forget_ratio: float = 0.1
    improve_ratio: float = 0.1
    granularity: Granularity = "element"
    scope: Scope = "global"
    num_batches: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        check("locate", self, forget_ratio=RATIO, improve_ratio=RATIO, num_batches=COUNT)


@dataclasses.dataclass(frozen=True)
class TokenRewardSettings(TrainSettings):
    """Which tokens of wrong responses are unaligned, and the reward model's training.

    Attributes:
        kind: `binary`, `soft` or `raw` from a reward model, or `edit` without one.
        threshold: of `binary`: weight 1 where the token's probability is below it.
        teacher: where corrections come from: the rows' right response (`gold`), their `correction`
            column (`column`), a local model (`model`), or one behind an OpenAI-compatible endpoint
            (`endpoint`), which gets the problems, solutions and responses as messages.
        teacher_model: for `teacher: model`: folder, hub id or alias; for `endpoint`: its name
            there.
        teacher_url: for `endpoint`: its base address, such as http://localhost:8000/v1.
        teacher_key_variable: for `endpoint`: environment variable that holds the API key; none: no
            key is sent.
        teacher_timeout_seconds: for `endpoint`: to wait for the next bytes of a reply.
        teacher_max_retries: for `endpoint`: of a request that gets no answer (429, 5xx, no
            connection).
        teacher_concurrency: for `endpoint`: requests under way at once.
        teacher_max_new_tokens: of one of its rewrites.
        teacher_temperature: of its draws; 0: greedy.
        teacher_num_samples: rewrites a response, of which the right one with the fewest edits is
            taken.
        reward_model: what the reward model is trained from; none: what the policy starts from.
        identity_rewrites: train it on right responses as well, which it is to leave as they are.
    """

    group: ClassVar[str] = "token_rewards"

    kind: Literal["edit", "binary", "soft", "raw"] = "binary"
    threshold: float = 0.5
    teacher: Literal["gold", "column", "model", "endpoint"] = "gold"
    teacher_model: str | None = None
    teacher_url: str | None = None
    teacher_key_variable: str | None = None
    teacher_timeout_seconds: float = 60.0
    teacher_max_retries: int = 6
    teacher_concurrency: int = 4
    teacher_max_new_tokens: int = 256
    teacher_temperature: float = 0.0
    teacher_num_samples: int = 1
    reward_model: str | None = None
    identity_rewrites: bool = True
    learning_rate: float = 2e-5
    epochs: int = 3
    warmup_ratio: float = 0.03
    max_length: int = 2048

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check(
            self.group,
            self,
            threshold=RATIO,
            teacher_max_new_tokens=COUNT,
            teacher_temperature=NOT_NEGATIVE,
            teacher_num_samples=COUNT,
            teacher_timeout_seconds=POSITIVE,
            teacher_max_retries=NOT_NEGATIVE,
            teacher_concurrency=COUNT,
        )
        self._check_endpoint()

    def _check_endpoint(self) -> None:
        if self.teacher != "endpoint":
            for name in ("teacher_url", "teacher_key_variable"):
                if getattr(self, name) is not None:
                    raise PipelineError(f"token_rewards.{name} is for teacher: endpoint alone")
            return
        if self.teacher_url is None or self.teacher_model is None:
            raise PipelineError(
                "token_rewards.teacher: endpoint needs token_rewards.teacher_url and teacher_model"
            )
        check_url(self.teacher_url)


@dataclasses.dataclass(frozen=True)
class ForgetSettings(TrainSettings):
    """The forgetting stage, on mask N1.

    Attributes:
        enabled: without it the improving stage starts from where forgetting would have.
        beta: of NPO.
        loss_type: per weighted token (ALLO), or per response (the original NPO).
        retain: term that keeps right responses as they are: none, nll or kl.
        retain_weight: weight of one retained unit against one forgotten.
    """

    group: ClassVar[str] = "forget"

    enabled: bool = True
    beta: float = 0.1
    loss_type: Literal["token", "sequence"] = "token"
    retain: Literal["none", "nll", "kl"] = "none"
    retain_weight: float = 1.0
    learning_rate: float = 5e-7
    warmup_ratio: float = 0.03

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check(self.group, self, beta=POSITIVE, retain_weight=NOT_NEGATIVE)


@dataclasses.dataclass(frozen=True)
class ImproveSettings(DPOSettings):
    """The improving stage, on mask N2: DPO with the noisy-token filter.

    Attributes:
        filter_side: whose tokens the filter looks at.
        drop_fraction: drop this share of a response's tokens, those of the highest reward; 0.1
            where neither fraction is given.
        keep_fraction: or keep only this share, those of the lowest (the public code).
    """

    group: ClassVar[str] = "improve"

    filter_side: FilterSide = "both"
    drop_fraction: float | None = None
    keep_fraction: float | None = None
    learning_rate: float = 5e-6

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check(self.group, self, drop_fraction=FRACTION, keep_fraction=FRACTION)
        if self.drop_fraction is not None and self.keep_fraction is not None:
            raise PipelineError("give one of improve.drop_fraction and improve.keep_fraction")

    @property
    def dropped(self) -> float | None:
        """The share to drop; None where a share to keep is given."""
        return DROPPED if self.drop_fraction is self.keep_fraction is None else self.drop_fraction


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """The machine's side.

    Attributes:
        precision: Lightning's: 32-true, bf16-mixed or bf16-true.
        accelerator: Lightning's.
        gradient_checkpointing: true | selective | false: trade time for activation memory.
        seed: of the training order.
    """

    precision: Literal["32-true", "bf16-mixed", "bf16-true"] = "32-true"
    accelerator: str = "auto"
    gradient_checkpointing: GradientCheckpointing = False
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
    """How the models of the table are compared on the held-out rows.

    Attributes:
        mode: of questions with choices: the likeliest choice (`logps`), or the one that the greedy
            response names (`generate`).
        max_new_tokens: of a greedy response.
        last_number: take the last number where a response has no "The answer is:".
        batch_size: responses at a time.
    """

    mode: Literal["logps", "generate"] = "generate"
    max_new_tokens: int = 48
    last_number: bool = False
    batch_size: int = 64

    def __post_init__(self) -> None:
        """Check the values."""
        check("evaluate", self, max_new_tokens=COUNT, batch_size=COUNT)
