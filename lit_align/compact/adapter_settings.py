"""What adapters a run trains, and on which layers."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from lit_align.errors import TrainingError

Kind = Literal["lora", "adalora"]
Quantization = Literal["none", "nf4"]
NONE = type(None)
TYPES: dict[str, tuple[type, ...]] = {
    "kind": (str,), "rank": (int,), "alpha": (int, float), "dropout": (int, float),
    "layers": (list, NONE), "mask": (str, NONE), "quantization": (str,),
    "initial_rank": (int, NONE), "rank_warmup": (int, float), "rank_final": (int, float),
    "rank_interval": (int,), "orthogonality": (int, float),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class AdapterSettings:
    """Adapters of peft in place of the weights: LoRA, AdaLoRA, and QLoRA (LoRA on NF4 weights).

    Attributes:
        kind: `lora` (ΔW = alpha/rank · B A) or `adalora` (ΔW = alpha/initial_rank · B E A, whose
            ranks move to the layers that need them).
        rank: r; of AdaLoRA the mean rank that is left at the end.
        alpha: see `kind`.
        dropout: of the adapters' inputs while training; the base's own dropout stays off.
        layers: names of weights (`model.layers.0.mlp.up_proj.weight`) or ends of module paths
            (`mlp.up_proj`, `q_proj`: all that end so); None: every linear layer and the head.
        mask: mask file whose wholly selected linear layers get adapters, in place of `layers`.
        quantization: `nf4` holds the base's linear layers, except the head, in 4 bits
            (bitsandbytes, extra `qlora`).
        initial_rank: AdaLoRA's rank at the start; None: 1.5 · rank.
        rank_warmup: AdaLoRA: share of the steps before ranks are taken away.
        rank_final: AdaLoRA: share of the steps at the end that train what is left.
        rank_interval: AdaLoRA: steps from one allocation to the next.
        orthogonality: AdaLoRA: weight in the loss of ‖A Aᵀ − I‖ and ‖Bᵀ B − I‖, a mean over all.
    """

    kind: Kind = "lora"
    rank: int = 32
    alpha: float = 64.0
    dropout: float = 0.1
    layers: list[str] | None = None
    mask: str | None = None
    quantization: Quantization = "none"
    initial_rank: int | None = None
    rank_warmup: float = 0.1
    rank_final: float = 0.3
    rank_interval: int = 1
    orthogonality: float = 0.5

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            TrainingError: names the setting and what it takes.
        """
        _choice("kind", self.kind, get_args(Kind))
        _choice("quantization", self.quantization, get_args(Quantization))
        _require(self.rank >= 1, f"rank is {self.rank}: at least 1")
        _require(self.alpha > 0, f"alpha is {self.alpha}: it must be > 0")
        _require(0 <= self.dropout < 1, f"dropout is {self.dropout}: from 0 to below 1")
        _require(self.layers is None or self.mask is None, "takes either layers or mask")
        _require(self.layers != [], "layers is empty: name at least one, or leave it out")
        if self.kind == "adalora":
            self._check_ranks()

    def _check_ranks(self) -> None:
        start = self.start_rank
        _require(start > self.rank, f"initial_rank is {start}: AdaLoRA takes more than rank")
        shares = self.rank_warmup, self.rank_final
        _require(min(shares) >= 0 and sum(shares) < 1, "rank_warmup and rank_final sum to below 1")
        _require(self.rank_interval >= 1, f"rank_interval is {self.rank_interval}: at least 1")
        _require(self.orthogonality >= 0, f"orthogonality is {self.orthogonality}: at least 0")

    @property
    def start_rank(self) -> int:
        """The rank that every layer's adapter is made with."""
        if self.kind == "lora":
            return self.rank
        return -(-3 * self.rank // 2) if self.initial_rank is None else self.initial_rank

    @classmethod
    def of(cls, settings: AdapterSettings | dict[str, Any] | None) -> AdapterSettings | None:
        """The settings themselves, or made of the dict that a checkpoint holds.

        Raises:
            TrainingError: the dict has other names, or values of other types.
        """
        if not isinstance(settings, dict):
            return settings
        for name, value in settings.items():
            known = TYPES.get(name, ()) if isinstance(name, str) else ()
            _require(type(value) in known, f"{name!r:.40} is no such setting, or not of its type")
        return cls(**settings)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise TrainingError(f"adapter: {message}")


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, f"{name} {value!r}: choose one of {', '.join(choices)}")
