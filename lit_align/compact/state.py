"""What a module knows of its compact parameters, and how to walk over all of them."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from lit_align.errors import TrainingError
from lit_align.shards import Shard, local
from lit_align_kernels.entries import Entries
from lit_align_kernels.swap_selected import gather_selected_, scatter_selected_

STATE = "_compact_parameters"  # attribute of a module: {parameter name: CompactParameter}

# Modules that hold compact parameters. A weak set, so that an optimiser's hook finds them without a
# link on the Parameters (deepcopy and fully_shard drop attributes of Parameters).
live_modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclasses.dataclass
class CompactParameter:
    """One selected parameter of a module.

    Attributes:
        name: the parameter's name in the mask (its full name in the model).
        entries: which entries train, in the order of the trainable vector.
        base: (M,) the base's values of those entries in the weight's dtype, or None where the
            caller asked not to keep them; of a sharded weight, those of this rank's rows.
        trainable: attribute of the module that holds the trainable Parameter, or None where the
            parameter is wholly selected in fp32 and trains itself.
        shard: of a weight that is sharded over processes, the entries in this rank's rows.
    """

    name: str
    entries: Entries
    base: Tensor | None
    trainable: str | None
    shard: Shard | None = None

    def move_to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Take index tensors and base values to the weight's device and dtype."""
        self.entries = self.entries.to(device)
        if self.base is not None:
            self.base = self.base.to(device, dtype)
        if self.shard is not None:
            self.shard = self.shard.to(device)


def trainable_name(parameter_name: str) -> str:
    """Attribute that holds the selected entries of a module's parameter."""
    return "selected" if parameter_name == "weight" else f"selected_{parameter_name}"


def compact_state(module: nn.Module) -> dict[str, CompactParameter]:
    """The compact parameters of one module, by the parameter's own name; empty where none is."""
    return module.__dict__.get(STATE, {})


@dataclasses.dataclass(frozen=True)
class Link:
    """A trainable Parameter and the weight that it stands for.

    `selected` is the weight itself where a parameter is wholly selected in fp32.
    """

    selected: nn.Parameter
    weight: nn.Parameter
    state: CompactParameter

    @property
    def is_whole(self) -> bool:
        """Whether the weight itself trains."""
        return self.selected is self.weight

    def here(self) -> tuple[Tensor, Entries]:
        """The rows of the weight that this process holds, and the selected entries in them."""
        shard = self.state.shard
        weight = local(self.weight.detach())
        return weight, self.state.entries if shard is None else shard.entries


def write_through(links_: Iterable[Link]) -> None:
    """Bring the trained values of all links into their weights, in one launch on a GPU.

    Sharded ones are gathered one after the other: every rank has to call this.
    """
    apart = [k for k in links_ if not k.is_whole]
    for link in apart:
        if link.state.shard is not None:
            link.state.shard.write(link.weight, link.selected)
    in_one = [k for k in apart if k.state.shard is None]
    scatter_selected_([(k.weight, k.state.entries, k.selected) for k in in_one])


def read_back(links_: Iterable[Link]) -> None:
    """Take the values of the weights into the trainable entries of all links, in one launch.

    Raises:
        TrainingError: the model is sharded.
    """
    apart = [k for k in links_ if not k.is_whole]
    if any(k.state.shard is not None for k in apart):
        raise TrainingError("the weights of a sharded model are not read back: write them before")
    gather_selected_([(k.weight, k.state.entries, k.selected) for k in apart])


def module_links(module: nn.Module) -> Iterator[Link]:
    """The links of one module."""
    for name, state in compact_state(module).items():
        weight = module._parameters[name]
        selected = weight if state.trainable is None else module._parameters[state.trainable]
        assert weight is not None and selected is not None
        yield Link(selected, weight, state)


def links(model: nn.Module) -> list[Link]:
    """Every link of a restricted model, tied parameters once, in the order of its modules."""
    found: dict[int, Link] = {}
    for module in model.modules():
        for link in module_links(module):
            found.setdefault(id(link.selected), link)
    return list(found.values())
