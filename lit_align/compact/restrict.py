"""Freeze a model, and make exactly the selected entries trainable."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_align.compact.layers import make_compact
from lit_align.compact.state import STATE, CompactParameter, compact_state, trainable_name
from lit_align.errors import MaskError, ModelError
from lit_align.masks import ParameterMask
from lit_align_kernels.entries import Entries
from lit_align_kernels.swap_selected import gather_entries
from lit_align_kernels.token_logprobs import WeightHandle


def restrict(
    model: nn.Module, mask: ParameterMask, *, keep_base: bool = True, masters: bool = True
) -> nn.Module:
    """Restrict training to the selected entries, in place.

    Every parameter is frozen. A module that holds a partly selected parameter changes its class
    and gets `selected`: the selected entries in fp32. A wholly selected fp32 parameter stays as it
    is and trains. Tied parameters have one `selected` that every use feeds.

    Args:
        model: a causal language model (any nn.Module), not restricted yet.
        mask: which entries train; its names are those of `model.named_parameters()`.
        keep_base: keep the base's values of the selected entries (mask's size, the weight's dtype),
            which `reference_policy` swaps in.
        masters: keep the selected entries in fp32. Without, they have the weight's dtype: train a
            model in bf16 or fp16 with `MaskedAdamW(stochastic_rounding=True)` then, since other
            optimisers would lose most updates.

    Returns:
        The model itself.

    Raises:
        MaskError: the mask belongs to another model or selects nothing.
        ModelError: the model is restricted already, or a selected weight is quantised or
            not contiguous.
    """
    if any(compact_state(m) for m in model.modules()):
        raise ModelError("the model is restricted already: load it again to restrict it anew")
    parameters = dict(model.named_parameters())
    mask.check_matches(
        {n: tuple(p.shape) for n, p in parameters.items()}, getattr(model, "base_fingerprint", None)
    )
    if mask.count() == 0:
        raise MaskError("the mask selects nothing: no parameter would train")
    selected = {n: mask.selections[n] for n in parameters if mask.selections[n].kind != "none"}
    _refuse_untrainable(parameters, set(selected))
    owners = parameter_owners(model)
    model.requires_grad_(False)
    touched: dict[nn.Module, None] = {}
    for name, selection in selected.items():
        weight = parameters[name]
        _install(name, weight, selection.entries(), owners[id(weight)], keep_base, masters)
        touched.update(dict.fromkeys(module for module, _ in owners[id(weight)]))
    for module in touched:
        make_compact(module)
    model.lit_align_mask = mask  # type: ignore[assignment]  # what export_delta exports
    return model


def _refuse_untrainable(parameters: dict[str, nn.Parameter], selected: set[str]) -> None:
    for name in selected:
        parameter = parameters[name]
        if not parameter.is_floating_point() or hasattr(parameter, "quant_state"):
            raise ModelError(
                f"{name} is quantised ({parameter.dtype}): its entries cannot train; select other "
                "parameters or load the model without quantisation"
            )
        if not parameter.is_contiguous():  # entries are positions in row-major order
            raise ModelError(f"{name} is not contiguous: its entries cannot train")


def _install(
    name: str,
    weight: nn.Parameter,
    entries: Entries,
    owners: list[tuple[nn.Module, str]],
    keep_base: bool,
    masters: bool,
) -> None:
    """Give every owner of `weight` the trainable entries and their state (one of each, shared)."""
    entries = entries.to(weight.device)
    base = gather_entries(weight.detach(), entries) if keep_base else None
    dtype = torch.float32 if masters else weight.dtype
    is_whole = entries.kind == "all" and weight.dtype == dtype
    trainable = None if is_whole else trainable_name(owners[0][1])
    state = CompactParameter(name, entries, base, trainable)
    if is_whole:
        weight.requires_grad_(True)
        selected = None
    else:
        values = gather_entries(weight.detach(), entries) if base is None else base
        selected = nn.Parameter(values.to(dtype, copy=True))
    for module, attribute in owners:
        module.__dict__.setdefault(STATE, {})[attribute] = state
        if trainable is not None:
            module.register_parameter(trainable, selected)


def parameter_owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every (module, attribute) under which a parameter is held, by `id(parameter)`."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, name))
    return owners


def head_handle(head: nn.Module) -> WeightHandle:
    """What `token_logprobs` needs of a head: its weight and, where it is compact, its entries.

    A frozen tied weight alone would silently lose the head's share of the gradient.
    """
    bias = getattr(head, "bias", None)
    weight = head._parameters["weight"]
    assert weight is not None
    state = compact_state(head).get("weight")
    if state is None or state.trainable is None:
        return WeightHandle(weight, bias=bias)
    return WeightHandle(weight, head._parameters[state.trainable], state.entries, bias)


def head_inputs(head: nn.Module, hidden: Tensor) -> tuple[Tensor, WeightHandle]:
    """What `token_logprobs` is given for a head: hidden states and weight whose product it is.

    A head that adds something of its own to its weight's product (an adapter, a gated change) says
    so with a method `head_inputs(hidden)`.
    """
    own = getattr(head, "head_inputs", None)
    return (hidden, head_handle(head)) if own is None else own(hidden)
