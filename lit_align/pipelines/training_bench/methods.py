"""What is compared: name, the code that runs it, the mask it trains, what it needs installed."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Literal, TypeAlias

from lit_align.modules.activation_checkpointing import GradientCheckpointing

MaskKind: TypeAlias = Literal["element", "row", "head", "layer"]
MASK_RATIOS: dict[MaskKind, float] = {"element": 0.1, "row": 0.1, "head": 0.1, "layer": 0.3}
INSTALL = 'pip install "lit-align[bench]"'


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to run DPO.

    Attributes:
        name: as the command line and the files call it.
        label: as tables and plots call it.
        runner: module of `training_bench.worker` whose `run(job, watch)` trains.
        mask: kind of the mask that training is restricted to; None: no mask.
        needs: packages outside lit-align's own dependencies.
        checkpointing: which activations are computed again, as `gradient_checkpointing` of
            lit-align's modules has it.
    """

    name: str
    label: str
    runner: str
    mask: MaskKind | None = None
    needs: tuple[str, ...] = ()
    checkpointing: GradientCheckpointing = False

    @property
    def is_ours(self) -> bool:
        """Whether lit-align itself trains."""
        return self.runner == OURS

    @property
    def missing(self) -> list[str]:
        """The packages it needs that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


OURS = "lightning_run"
WARM_UP = Method("warm-up", "lit-align, for the masks", "warm_up")
TRL_NEEDS = ("trl",)
METHODS = {
    method.name: method
    for method in (
        Method("rows", "lit-align, 10 % of rows", OURS, "row"),
        Method("elements", "lit-align, 10 % of elements", OURS, "element"),
        Method("rows-selective", "10 % of rows, selective", OURS, "row", checkpointing="selective"),
        Method(
            "elements-selective",
            "10 % of elements, selective",
            OURS,
            "element",
            checkpointing="selective",
        ),
        Method("heads", "lit-align, 10 % of heads", OURS, "head"),
        Method("layers", "lit-align, 30 % of layers", OURS, "layer"),
        Method("full", "lit-align, all parameters", OURS),
        Method("trl", "TRL DPOTrainer", "trl_run", needs=TRL_NEEDS),
        Method("trl-precomputed", "TRL, reference precomputed", "trl_run", needs=TRL_NEEDS),
        Method(
            "trl-checkpointing",
            "TRL, gradient checkpointing",
            "trl_run",
            needs=TRL_NEEDS,
            checkpointing=True,
        ),
        Method("trl-lora", "TRL + peft LoRA", "trl_run", needs=TRL_NEEDS),
        Method("trl-shira", "TRL + peft SHiRA", "trl_run", needs=TRL_NEEDS),
        Method("dense-masked", "dense masked AdamW (ALLO's public code)", "plain_run", "element"),
        Method("torch", "torch, two models, AdamW", "plain_run"),
    )
}


def mask_file(kind: MaskKind) -> str:
    """The name of a mask in a folder of masks."""
    return f"{kind}.safetensors"
