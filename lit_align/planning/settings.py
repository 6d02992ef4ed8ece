"""What a plan is made for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

from lit_align.compact.adapter_settings import AdapterSettings
from lit_align.data.shared_prefix import Layout
from lit_align.errors import TrainingError
from lit_align.modules.activation_checkpointing import GradientCheckpointing

Method: TypeAlias = Literal["dpo", "npo", "sft", "ila"]
PlanPrecision: TypeAlias = Literal["32-true", "bf16-mixed", "bf16-true"]
PlanReference: TypeAlias = Literal["cache", "swap", "none"]
Strategy: TypeAlias = Literal["one_device", "ddp", "fsdp2"]
PlanDevice: TypeAlias = Literal["gpu", "cpu"]


@dataclasses.dataclass(frozen=True)
class PlanSettings:
    """A run whose memory is to be known.

    Attributes:
        model: see `read_config`.
        method: the training module; `ila` learns gates of a LoRA change of every linear layer.
        mask: `none` (everything trains, or every layer has an adapter), `full`, `elements`, `rows`,
            `heads`, `layers`, or a mask file.
        ratio: share of the units, of a mask by name.
        adapter: adapters in place of the weights.
        lengths: of each row: tokens of prompt and response, of a pair prompt, chosen and rejected.
        layout: None: the method's default.
        precision: of the trainer.
        masters: keep 16-bit weights' trained entries in fp32; without, rounding is stochastic.
        gradient_checkpointing: keep the inputs of layers alone (True), or what products make.
        reference: where the reference's log-probs come from, of a method that has one.
        strategy: what is on each GPU.
        devices: how many.
        device: whose allocations are counted.
    """

    model: str
    lengths: Sequence[tuple[int, ...]]
    method: Method = "dpo"
    mask: str = "none"
    ratio: float = 0.1
    adapter: AdapterSettings | None = None
    layout: Layout | None = None
    precision: PlanPrecision = "bf16-true"
    masters: bool = True
    gradient_checkpointing: GradientCheckpointing = False
    reference: PlanReference = "cache"
    strategy: Strategy = "one_device"
    devices: int = 1
    device: PlanDevice = "gpu"

    def __post_init__(self) -> None:
        """Check what the module that is planned would not.

        Raises:
            TrainingError: a setting that cannot be, or two that contradict each other.
        """
        for name, kind in (
            ("method", Method), ("precision", PlanPrecision), ("reference", PlanReference),
            ("strategy", Strategy), ("device", PlanDevice),
        ):  # fmt: skip
            _require(
                getattr(self, name) in get_args(kind),
                f"{name} {getattr(self, name)!r}: choose one of {', '.join(get_args(kind))}",
            )
        widths = {len(row) for row in self.lengths}
        wanted = 3 if self.method == "dpo" else 2
        _require(bool(widths), "the batch has no rows")
        _require(
            widths == {wanted} and all(min(row) >= 1 for row in self.lengths),
            f"{self.method} takes rows of {wanted} lengths, each at least 1 (prompt and responses)",
        )
        _require(self.devices >= 1, f"{self.devices} devices: at least 1")
        if self.strategy == "one_device":
            _require(self.devices == 1, f"{self.devices} devices need strategy ddp or fsdp2")
        _require(
            self.method != "ila" or (self.mask == "none" and self.adapter is None),
            "ila learns gates over all layers: it takes no mask and no adapter",
        )
        _require(
            self.device == "gpu" or self.precision == "32-true",
            f"precision {self.precision} on a CPU: bf16 products are orders of magnitude slower "
            "there, plan 32-true",
        )

    @property
    def chosen_layout(self) -> Layout:
        """The layout, or the method's default."""
        return self.layout or ("shared_prefix" if self.method == "dpo" else "padded")

    def describe(self) -> dict[str, Any]:
        """As JSON takes it."""
        return dataclasses.asdict(self) | {"layout": self.chosen_layout}


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise TrainingError(message)
