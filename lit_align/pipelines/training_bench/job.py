"""What a worker is told and what it tells, as JSON files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lit_align.errors import BenchmarkError
from lit_align.files import write_atomically
from lit_align.modules.activation_checkpointing import GradientCheckpointing

Precision: TypeAlias = Literal["32-true", "bf16-mixed", "bf16-true"]
JOB_FILE = "job.json"
RESULT_FILE = "result.json"
SCRATCH = "scratch"  # beside them: what a run writes for itself, its checkpoint above all


@dataclasses.dataclass(frozen=True)
class Job:
    """One training run of one method; the same settings for every method.

    Attributes:
        method: a name of `METHODS`.
        model: local folder, hub id or alias.
        pairs: file of token-id rows, trained in its order.
        steps: how many, warm-up steps included.
        pairs_per_step: pairs in a batch.
        max_length: no pair is longer.
        learning_rate: constant.
        threads: of torch and of the libraries under it.
        device: `cpu` or `cuda`.
        beta: of DPO.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: of AdamW.
        gradient_clip: largest norm of the gradient.
        mask: file of the mask that training is restricted to.
        saves: whether a checkpoint is written, to count its bytes.
        checkpointing: see `Method`.
        precision: of Lightning's trainer: 32-true, bf16-mixed, or bf16-true (TRL: a model and its
            optimiser in bf16).
    """

    method: str
    model: str
    pairs: str
    steps: int
    pairs_per_step: int
    max_length: int
    learning_rate: float
    threads: int
    device: str
    beta: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    mask: str | None = None
    saves: bool = True
    checkpointing: GradientCheckpointing = False
    precision: Precision = "32-true"

    @property
    def num_pairs(self) -> int:
        """Pairs that the whole run goes through, each once."""
        return self.steps * self.pairs_per_step

    def write(self, folder: Path) -> Path:
        """Write `job.json`."""
        return _write(folder / JOB_FILE, self)

    @classmethod
    def read(cls, path: Path) -> Job:
        """Read what `write` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**values | {"betas": tuple(values["betas"])})


@dataclasses.dataclass(frozen=True)
class Result:
    """What one run was measured to need.

    Attributes:
        method: a name of `METHODS`.
        step_seconds: of every step, from the end of the one before (data loading and the
            optimiser's work are in it); the first from the beginning of training.
        losses: of every step, before its update.
        trained_parameters: entries that train.
        optimizer_bytes: tensors of the optimiser's state.
        mask_bytes: a dense mask that the optimiser keeps beside its state.
        imports_mib: memory before a model is loaded.
        peak_mib: most memory up to the end of training: resident in the process on a CPU (imports
            included), allocated on a GPU.
        checkpoint_bytes: files of a checkpoint that training can go on from; None: not saved.
        reference_seconds: of the one pass of the reference over all pairs before training.
        reference_logps: (chosen, rejected) log-probs under the reference of every pair, in order.
        details: anything else worth keeping (versions, layout).
    """

    method: str
    step_seconds: list[float]
    losses: list[float]
    trained_parameters: int
    optimizer_bytes: int
    mask_bytes: int
    imports_mib: float
    peak_mib: float
    checkpoint_bytes: int | None
    reference_seconds: float | None
    reference_logps: list[list[float]] | None
    details: dict[str, Any]

    def write(self, folder: Path) -> Path:
        """Write `result.json`."""
        return _write(folder / RESULT_FILE, self)

    @classmethod
    def read(cls, folder: Path) -> Result:
        """Read what `write` wrote.

        Raises:
            BenchmarkError: the file is missing or damaged.
        """
        path = folder / RESULT_FILE
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise BenchmarkError(
                f"{path}: no result of a worker; remove {folder}: {error!r}"
            ) from error


def _write(path: Path, value: Job | Result) -> Path:
    write_atomically(path, json.dumps(dataclasses.asdict(value), indent=1).encode() + b"\n")
    return path
