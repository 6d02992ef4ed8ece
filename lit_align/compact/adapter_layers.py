"""peft's layers inside a model: what they keep in fp32, and how a head of theirs is multiplied."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from lit_align.compact.adapter_settings import AdapterSettings
from lit_align.compact.low_rank import LowRank
from lit_align.errors import ModelError
from lit_align_kernels.entries import Entries
from lit_align_kernels.token_logprobs import WeightHandle

ADAPTER = "default"  # peft's name of the one adapter
STATE = "lit_align_adapters"  # attribute of a model


@dataclasses.dataclass
class AdapterState:
    """What a model knows of its adapters.

    Attributes:
        settings: that they were made with.
        modules: layer name → path of its module.
        tuner: peft's; held here, since as a submodule of the model it would hold itself.
    """

    settings: AdapterSettings
    modules: dict[str, str]
    tuner: BaseTuner


def full_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters; of packed ones, those before they were packed."""
    return {
        name: tuple(p.quant_state.shape if hasattr(p, "quant_state") else p.shape)
        for name, p in model.named_parameters()
    }


def adapter_state(model: nn.Module) -> AdapterState:
    """The state of a model with adapters.

    Raises:
        ModelError: it has none.
    """
    state = model.__dict__.get(STATE)
    if state is None:
        raise ModelError(f"{type(model).__name__} has no adapters: add_adapters first")
    return state


class AdaptedLayer(nn.Module):
    """Mixin of peft's LoRA and AdaLoRA layers in a model; what is only named here is theirs."""

    lora_A: Any  # noqa: N815 - peft's names
    lora_B: Any  # noqa: N815
    lora_E: Any  # noqa: N815
    lora_dropout: Any
    scaling: dict[str, float]
    ranknum: Any
    disable_adapters: bool
    get_base_layer: Callable[[], nn.Module]

    def low_rank(self) -> LowRank:
        """The adapter's factors as they are now, with their graph."""
        a, b = self.lora_A[ADAPTER], self.lora_B[ADAPTER]
        if isinstance(a, nn.Linear):
            return LowRank(a.weight, b.weight, self.scaling[ADAPTER])
        ranks = float(self.ranknum[ADAPTER]) + 1e-5  # as peft has it
        return LowRank(a * self.lora_E[ADAPTER], b, self.scaling[ADAPTER] / ranks)

    def factors(self) -> dict[str, nn.Parameter]:
        """The trained tensors under peft's names in its files."""
        a, b = self.lora_A[ADAPTER], self.lora_B[ADAPTER]
        if isinstance(a, nn.Linear):
            return {"lora_A.weight": a.weight, "lora_B.weight": b.weight}
        return {"lora_A": a, "lora_B": b, "lora_E": self.lora_E[ADAPTER]}

    def head_inputs(self, hidden: Tensor) -> tuple[Tensor, WeightHandle]:
        """Hidden states and weight whose product is this head's: [h, s·h Aᵀ] and [W | B].

        Args:
            hidden: (N, D).

        Returns:
            (N, D + r), and the handle of a (V, D + r) weight of which B trains. So the low-rank
            part is a few more columns of the one product, and its logits are never formed apart.
        """
        base = self.get_base_layer()
        weight, bias = base._parameters["weight"], base._parameters.get("bias")
        assert weight is not None
        if self.disable_adapters:
            return hidden, WeightHandle(weight, bias=bias)
        change = self.low_rank()
        dropped = self.lora_dropout[ADAPTER](hidden.to(change.a.dtype))
        low = (dropped @ change.a.t() * change.scale).to(hidden.dtype)
        joint = torch.cat([weight, change.b.detach().to(weight.dtype)], 1)
        width, rank = weight.shape[1], change.b.shape[1]
        columns = torch.arange(width, width + rank, device=weight.device)
        entries = Entries("rows", tuple(joint.shape), axis=1, rows=columns)
        selected = change.b.t().reshape(-1).float()  # entries are stored column by column
        return torch.cat([hidden, low], 1), WeightHandle(joint, selected, entries, bias)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
        """Cast and move the layer as usual; the adapter moves but stays in fp32."""
        kept = [(p, p.data, p.grad) for p in self._adapter_parameters()]
        super()._apply(fn, recurse)
        for parameter, data, grad in kept:
            parameter.grad = None
            parameter.data = data.to(parameter.device)
            parameter.grad = None if grad is None else grad.to(parameter.device, torch.float32)
        return self

    def _adapter_parameters(self) -> Iterator[nn.Parameter]:
        return (p for n, p in self.named_parameters() if not n.startswith("base_layer."))


def adapted_modules(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Layer name → peft's layer."""
    found: Any = adapter_state(model).modules.items()
    layers: dict[str, Any] = {name: model.get_submodule(path) for name, path in found}
    return layers


@functools.cache
def _adapted_class(original: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a peft layer's class; cached, so that equal layers share one."""
    members = {"__module__": original.__module__}
    return type(f"Adapted{original.__name__}", (AdaptedLayer, original), members)


def make_adapted(module: nn.Module) -> None:
    """Change the class of one of peft's layers, and hold its adapter in fp32."""
    adapted: Any = module
    original: Any = type(module)
    adapted.__class__ = _adapted_class(original)
    for parameter in adapted._adapter_parameters():
        parameter.data = parameter.data.float()
    if hasattr(module, "ranknum"):  # over 16-bit weights, peft lets the count itself train
        adapted.ranknum[ADAPTER].requires_grad_(False)
