"""ILA's stage 2: θ_i = θ_0,i + σ(s_i)·Δθ_i for every linear layer, and only s trains.

(ILA, arXiv 2410.17875, Eq. 7.) Nothing is merged: the base's weights stay as they are, the changes
are kept once beside them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lit_align.compact.adapters import has_adapters
from lit_align.compact.change import Change
from lit_align.compact.gated_layers import SCORE, Gate, Switch, is_plain_linear, make_gated
from lit_align.compact.low_rank import LowRank
from lit_align.compact.restrict import parameter_owners
from lit_align.errors import ModelError, TrainingError
from lit_align.masks.linear_layers import linear_layers

GATES = "lit_align_gates"  # attribute of a gated model


@dataclasses.dataclass
class LayerGates:
    """The gates of a model.

    Attributes:
        modules: layer name → a module that holds its score.
        switch: what all gates look at for a value that stands in for σ(s).
        others: of what changed beside linear layers: name → (parameter, values that it has not
            now): the base's, while the gates are closed the changed ones; None: not kept.
    """

    modules: dict[str, nn.Module]
    switch: Switch
    others: dict[str, tuple[nn.Parameter, Tensor | None]]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Layer name → its score, the trainable Parameter."""
        return {n: m._parameters[SCORE] for n, m in self.modules.items()}  # type: ignore[misc]

    def values(self) -> Tensor:
        """γ of all layers (N,), with gradient."""
        return torch.sigmoid(torch.stack(list(self.parameters().values())))

    def scores(self) -> dict[str, float]:
        """Layer name → s."""
        return {name: float(score.detach()) for name, score in self.parameters().items()}

    def gates(self) -> dict[str, float]:
        """Layer name → σ(s)."""
        return dict(zip(self.modules, self.values().detach().tolist(), strict=True))


def gate(
    model: nn.Module, change: Change, *, initial_score: float = 4.0, keep_base: bool = True
) -> LayerGates:
    """Put every changed linear layer of a model under a gate, in place; only the scores train.

    Args:
        model: the base, as it was loaded.
        change: what fine-tuning made of it. Its tensors are used, not copied. What changed beside
            linear layers is written into the model and stays.
        initial_score: s_0 of every layer.
        keep_base: keep the base's values of what changed beside linear layers, which closed gates
            bring back.

    Raises:
        ModelError: the model is gated, restricted or adapted already; or a layer of the change is
            none of the model's, has another shape, or cannot be gated.
    """
    taken = any(hasattr(model, attribute) for attribute in (GATES, "lit_align_mask"))
    if taken or has_adapters(model):
        raise ModelError(
            "the model is gated or restricted already, or has adapters: load it again to gate it"
        )
    parameters = dict(model.named_parameters())
    layers = linear_layers(model)
    for name, layer_change in change.layers.items():
        _check(name, layers, layer_change)
    for name, values in change.others.items():
        if name not in parameters or parameters[name].shape != values.shape:
            raise ModelError(f"the change holds {name!r}, which the model has not in that shape")
    owners = parameter_owners(model)
    model.requires_grad_(False)
    gates = LayerGates({}, Switch(), _apply_others(parameters, change.others, keep_base))
    for name in (n for n in layers if n in change.layers):
        weight = parameters[name]
        shared = Gate(name, change.layers[name], gates.switch)
        shared.move_to(weight.device, weight.dtype)
        start = torch.full((), initial_score, dtype=torch.float32, device=weight.device)
        score = nn.Parameter(start)
        users = [m for m, attribute in owners[id(weight)] if attribute == "weight"]
        if len(users) < len(owners[id(weight)]):
            raise ModelError(f"{name} is also used as another parameter: it cannot be gated")
        if isinstance(shared.change, LowRank):  # an adapter of a tied head changes no embedding
            users = [layers[name]]
        for module in users:
            make_gated(module, shared, score)
        gates.modules[name] = layers[name]
    setattr(model, GATES, gates)
    return gates


def layer_gates(model: nn.Module) -> LayerGates:
    """The gates of a gated model.

    Raises:
        ModelError: it has none.
    """
    gates = getattr(model, GATES, None)
    if gates is None:
        raise ModelError("the model has no gates: gate it with the change to look at")
    return gates


@contextlib.contextmanager
def open_gates(model: nn.Module, value: float) -> Iterator[None]:
    """All gates stand at `value` inside this context, without gradient for the scores.

    At 0 the model is the base to the bit, also in what changed beside linear layers; at 1 it is the
    fine-tuned model up to rounding.

    Raises:
        TrainingError: `value` 0 where the base's other values were not kept.
    """
    gates = layer_gates(model)
    before = gates.switch.value
    exchange = (value == 0.0) != (before == 0.0)
    if exchange and any(kept is None for _, kept in gates.others.values()):
        raise TrainingError("closed gates need the base's other values: gate with keep_base=True")
    gates.switch.value = value
    if exchange:
        _exchange(gates)
    try:
        yield
    finally:
        gates.switch.value = before
        if exchange:
            _exchange(gates)


def closed_gates(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """The base inside this context, to the bit: the reference policy."""
    return open_gates(model, 0.0)


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name → shape of a model's own parameters: the scores of gates are none of them."""
    gates = getattr(model, GATES, None)
    scores = set() if gates is None else {id(score) for score in gates.parameters().values()}
    return {n: tuple(p.shape) for n, p in model.named_parameters() if id(p) not in scores}


def _check(name: str, layers: dict[str, nn.Module], change: LowRank | Tensor) -> None:
    if name not in layers:
        raise ModelError(f"the change holds {name!r}, which is no linear layer of the model")
    module = layers[name]
    weight = module._parameters["weight"]
    assert weight is not None
    shape = tuple(weight.shape)
    if not weight.is_floating_point() or hasattr(weight, "quant_state"):
        raise ModelError(f"{name} is quantised: load the model without quantisation to gate it")
    if isinstance(change, Tensor):
        found: tuple[int, ...] = tuple(change.shape)
    else:
        if not is_plain_linear(module):
            raise ModelError(f"{name}: a low-rank change of a {type(module).__name__} is not known")
        out_in = (change.b.shape[0], change.a.shape[1])
        found = out_in if isinstance(module, nn.Linear) else out_in[::-1]
    if found != shape:
        raise ModelError(f"{name} is {shape} in the model and {found} in the change")


def _apply_others(
    parameters: dict[str, nn.Parameter], others: dict[str, Tensor], keep_base: bool
) -> dict[str, tuple[nn.Parameter, Tensor | None]]:
    kept: dict[str, tuple[nn.Parameter, Tensor | None]] = {}
    for name, values in others.items():
        parameter = parameters[name]
        kept[name] = (parameter, parameter.data if keep_base else None)
        parameter.data = values.to(parameter.device, parameter.dtype)
    return kept


def _exchange(gates: LayerGates) -> None:
    """The base's other values for the changed ones, or back; without a copy."""
    for name, (parameter, kept) in gates.others.items():
        assert kept is not None
        gates.others[name] = (parameter, parameter.data)
        parameter.data = kept.to(parameter.device, parameter.dtype)
        # A graph that waits for its backward must not go on with other values.
        torch.autograd.graph.increment_version(parameter)
