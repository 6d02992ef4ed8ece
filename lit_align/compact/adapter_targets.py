"""Which layers of a model get adapters: by name, or by a mask of whole layers."""

from __future__ import annotations

from torch import nn

from lit_align.compact.adapter_layers import full_shapes
from lit_align.compact.adapter_settings import AdapterSettings
from lit_align.errors import MaskError, ModelError
from lit_align.masks import ParameterMask
from lit_align.masks.linear_layers import linear_layers, module_names


def chosen_modules(
    model: nn.Module, settings: AdapterSettings, mask: ParameterMask | None
) -> dict[str, str]:
    """Layer name → module path of the layers that get adapters, in model order.

    Args:
        model: without adapters.
        settings: may name layers, or a mask file.
        mask: of a callback, in place of both.

    Raises:
        ModelError: a layer does not exist.
        MaskError: layers are named twice over, or by a mask that adapters cannot follow.
    """
    modules = module_names(model)
    if mask is not None and (settings.mask or settings.layers):
        raise MaskError(
            "a callback's mask says which layers get adapters, and so do the adapter's own "
            "settings: leave out adapter.mask and adapter.layers, or the callback"
        )
    if settings.mask is not None:
        mask = ParameterMask.load(settings.mask)
    if mask is not None:
        return {name: modules[name] for name in layers_of_mask(model, mask)}
    if settings.layers is None:
        return modules
    wanted: dict[str, None] = {}
    for given in settings.layers:
        wanted.update(dict.fromkeys(_matching(given, modules)))
    return {name: path for name, path in modules.items() if name in wanted}


def _matching(given: str, modules: dict[str, str]) -> list[str]:
    found = [n for n, p in modules.items() if given in (n, p) or p.endswith(f".{given}")]
    if not found:
        raise ModelError(
            f"adapter: no linear layer is {given!r} or ends in it; this model's are "
            f"{', '.join(sorted({p.rpartition('.')[2] for p in modules.values()}))} "
            f"({len(modules)} layers, the first is {next(iter(modules))})"
        )
    return found


def layers_of_mask(model: nn.Module, mask: ParameterMask) -> list[str]:
    """The linear layers that a mask of whole layers selects.

    Raises:
        MaskError: it selects parts of a parameter, something else than linear layers, or nothing,
            or belongs to another model.
    """
    mask.check_matches(full_shapes(model), getattr(model, "base_fingerprint", None))
    layers = linear_layers(model)
    chosen = {n: s.kind for n, s in mask.selections.items() if s.kind != "none"}
    for name, kind in chosen.items():
        if kind != "all":
            raise MaskError(
                f"the mask ({mask.metadata.granularity}) selects a part of {name!r}, and an "
                "adapter takes whole layers: use a mask of granularity layer, or no adapter"
            )
        if name not in layers:
            raise MaskError(
                f"the mask selects {name!r}, which is no linear layer and cannot have an adapter: "
                "rank linear layers alone (method layer_gate), or name them in adapter.layers"
            )
    if not chosen:
        raise MaskError("the mask selects no layer: nothing would get an adapter")
    return [name for name in layers if name in chosen]
