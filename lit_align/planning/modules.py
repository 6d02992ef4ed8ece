"""Training modules without weights, and the trainer's part that a step looks at."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast, get_args

import numpy as np
import torch
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from transformers import PreTrainedModel

from lit_align.batch import CHOSEN, REJECTED, PackedBatch
from lit_align.compact.change import Change
from lit_align.compact.low_rank import LowRank
from lit_align.data.schema import TokenizedRow, TokenizedSequence
from lit_align.data.shared_prefix import collator
from lit_align.masks.linear_layers import linear_layers
from lit_align.modules import MaskedDPO, SupervisedFineTuning, TokenWeightedNPO
from lit_align.modules.base import LanguageModelModule
from lit_align.modules.ila_mask_learning import ILAMaskLearning
from lit_align.planning.masks import MaskKind, PlannedMask, planned_mask, planned_mask_of_file
from lit_align.planning.model_configs import read_config, weightless_model
from lit_align.planning.nf4 import pack
from lit_align.planning.settings import PlanSettings

DTYPES = {"bf16-true": torch.bfloat16}
ILA_RANK = 32  # of the paper's LoRA change
KINDS: dict[str, type[LanguageModelModule]] = {
    "dpo": MaskedDPO,
    "npo": TokenWeightedNPO,
    "sft": SupervisedFineTuning,
    "ila": ILAMaskLearning,
}


@dataclasses.dataclass
class StepTrainer:
    """What a module's step asks of its trainer."""

    precision: str
    precision_plugin: Precision
    callbacks: list[Any]
    strategy: Any
    world_size: int = 1
    accumulate_grad_batches: int = 1
    log_every_n_steps: int = 0
    global_step: int = 0
    estimated_stepping_batches: int = 100
    datamodule: None = None


@dataclasses.dataclass(frozen=True)
class _OneDevice:
    root_device: torch.device


class _PlannedModule(LanguageModelModule):
    """Mixin: a model made of its configuration, nothing read, nothing logged."""

    planned: PlanSettings

    def load_base(self) -> PreTrainedModel:
        """The architecture, without weights."""
        model = weightless_model(read_config(self.planned.model), self.weight_dtype)
        adapter = self.planned.adapter
        return pack(model) if adapter and adapter.quantization == "nf4" else model

    def _attach_reference_logps(self, *args: Any) -> None:
        """They lie in the main memory."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is logged."""


class _PlannedGates(_PlannedModule, ILAMaskLearning):
    """Gates over a LoRA change of every linear layer."""


@dataclasses.dataclass(frozen=True)
class _MaskCallback:
    mask: PlannedMask | None

    def parameter_mask(self, trainer: Any, module: Any) -> PlannedMask | None:
        return self.mask


def mask_of(settings: PlanSettings) -> PlannedMask | None:
    """The mask of a plan; call it outside of `FakeTensorMode`, since masks hold values.

    Raises:
        MaskError: see `planned_mask` and `planned_mask_of_file`.
    """
    s = settings
    if s.mask == "none":
        return None
    with torch.device("meta"):
        model = weightless_model(read_config(s.model), torch.bfloat16)
    if s.mask in get_args(MaskKind):
        mask = planned_mask(model, cast(MaskKind, s.mask), s.ratio)
    else:
        mask = planned_mask_of_file(model, s.mask)
    return mask.on_gpu() if s.device == "gpu" else mask


def planned_module(
    settings: PlanSettings, mask: PlannedMask | None
) -> tuple[LanguageModelModule, StepTrainer]:
    """The training module of a plan, its model not made yet, and its trainer.

    The module knows its trainer by a weak reference: keep both.
    """
    s = settings
    kind = KINDS[s.method]
    planned: Any = type(f"Planned{kind.__name__}", (_PlannedModule, kind), {"planned": s})
    own: dict[str, Any] = {"change": ""} if s.method == "ila" else {"adapter": s.adapter}
    if s.method in ("dpo", "npo"):
        own["reference"] = s.reference
    module = planned(
        s.model,
        gradient_checkpointing=s.gradient_checkpointing,
        stochastic_rounding=not s.masters,
        **own,
    )
    trainer = StepTrainer(
        s.precision, _precision(s.precision), [_MaskCallback(mask)], _OneDevice(torch.device("cpu"))
    )
    module.trainer = trainer
    return module, trainer


def _precision(name: str) -> Precision:
    if name == "bf16-mixed":
        return MixedPrecision("bf16-mixed", "cpu")
    return HalfPrecision("bf16-true") if name == "bf16-true" else Precision()


def low_rank_change(_: Any, model: PreTrainedModel) -> Change:
    """In place of `read_change`: a LoRA change of every linear layer."""
    changes: dict[str, LowRank | torch.Tensor] = {}
    for name, layer in linear_layers(model).items():
        weight: Any = layer._parameters["weight"]
        rows, columns = weight.shape
        a, b = weight.new_empty(ILA_RANK, columns), weight.new_empty(rows, ILA_RANK)
        changes[name] = LowRank(a, b, 1.0)
    return Change(changes, {})


def made_up_batch(settings: PlanSettings) -> PackedBatch:
    """A batch of rows of the settings' lengths, in their layout."""
    rows = [_row(i, lengths) for i, lengths in enumerate(settings.lengths)]
    batch = collator(settings.chosen_layout, 0)(rows)
    if settings.method in ("dpo", "npo") and settings.reference == "cache":
        batch.ref_per_token_logps = torch.zeros_like(batch.token_weights)
    return batch


def _row(number: int, lengths: Sequence[int]) -> TokenizedRow:
    prompt, *responses = lengths
    sequences = [
        # Responses differ from their first token on: nothing of them is shared.
        TokenizedSequence(np.full(prompt, 3), np.full(length, 4 + role), None, role)
        for role, length in zip((CHOSEN, REJECTED), responses, strict=False)
    ]
    return TokenizedRow(number, tuple(sequences))
