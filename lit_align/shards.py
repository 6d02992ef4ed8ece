"""What a rank holds of weights and selected entries that are sharded over processes (FSDP2).

FSDP2 cuts every parameter along dim 0: rank r of W holds `ceil(n / W)` rows from `r * ceil(n / W)`
on (the last ranks fewer, or none), and a layer's parameters are whole only while it computes. So a
rank holds some rows of a frozen weight, and some of the selected entries: an equal share of them,
which need not lie in its own rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_align.errors import ModelError
from lit_align_kernels.entries import Entries
from lit_align_kernels.swap_selected import scatter_selected_


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of this tensor alone."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory; the tensor itself where it is whole."""
    if not isinstance(tensor, DTensor):
        return tensor
    detached: Any = tensor.detach()  # still a DTensor
    part: Tensor = detached.to_local()
    return part


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, gathered from all ranks, each of which has to call this."""
    if not isinstance(tensor, DTensor):
        return tensor
    detached: Any = tensor.detach()
    gathered: Tensor = detached.full_tensor()
    return gathered


def part_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, sharded as another of its shape; itself where that one is whole."""
    if isinstance(value, DTensor) or not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    mesh = like.device_mesh
    first, last = rows_of_rank(len(value), mesh.get_local_rank(), mesh.size())
    own = value[first:last].to(like.device)
    part: Tensor = DTensor.from_local(
        own, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return part


def refuse_shards(model: nn.Module, what: str) -> None:
    """Stop before one process does something with weights of which it holds a part alone.

    Raises:
        ModelError: the model is sharded; says what to do instead.
    """
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise ModelError(
            f"{what}: the model is sharded over processes; save a checkpoint of the run, and read "
            "it on one process: lit-align export --checkpoint FOLDER"
        )


@dataclasses.dataclass
class Shard:
    """The selected entries that lie in this rank's rows of a sharded weight.

    Attributes:
        entries: of this rank's rows, as of a weight of their own.
        width: of `selected` as a matrix, of which they are the columns [start, stop): everything in
            one row, but (rows, in) where a row of entries is a column of the weight.
        start: first of those columns.
        stop: behind the last.
    """

    entries: Entries
    width: int
    start: int
    stop: int

    @classmethod
    def of(cls, entries: Entries, weight: Tensor) -> Shard:
        """Cut the entries of a weight as FSDP2 has cut the weight."""
        assert isinstance(weight, DTensor)
        rank, ranks = weight.device_mesh.get_local_rank(), weight.device_mesh.size()
        return cls.cut(entries, *rows_of_rank(weight.shape[0], rank, ranks))

    @classmethod
    def cut(cls, entries: Entries, first: int, last: int) -> Shard:
        """The entries that lie in `weight[first:last]`."""
        shape = (last - first, *entries.shape[1:])
        if entries.kind == "rows" and entries.axis == 1:
            own = Entries("rows", shape, 1, rows=entries.rows)
            return cls(own, entries.shape[0], first, last)
        inner = math.prod(entries.shape[1:])  # entries of the weight in one of its rows
        if entries.kind == "all":
            return cls(Entries("all", shape), entries.numel, first * inner, last * inner)
        if entries.kind == "rows":
            assert entries.rows is not None
            matrices = inner // entries.row_length  # rows in one index of dim 0: 3-D experts
            start, stop = _between(entries.rows, first * matrices, last * matrices)
            own = Entries("rows", shape, rows=entries.rows[start:stop] - first * matrices)
            length = entries.row_length
            return cls(own, entries.numel, start * length, stop * length)
        assert entries.positions is not None
        start, stop = _between(entries.positions, first * inner, last * inner)
        positions = entries.positions[start:stop] - first * inner
        own = Entries("elements", shape, positions=positions)
        width = max(own.row_length, 1)
        bounds = torch.arange(math.prod(shape) // width + 1, device=positions.device) * width
        own.row_offsets = torch.searchsorted(positions, bounds.to(positions.dtype))
        return cls(own, entries.numel, start, stop)

    def take(self, values: Tensor) -> Tensor:
        """Of one value for each selected entry (M,), those of this rank's rows, contiguous."""
        return values.view(-1, self.width)[:, self.start : self.stop].reshape(-1)

    def write(self, weight: Tensor, selected: Tensor) -> None:
        """Gather `selected` from all ranks, and write what lies in this rank's rows of the weight.

        Every rank has to call this.
        """
        values = self.take(whole(selected))
        if self.entries.numel:
            scatter_selected_([(local(weight), self.entries, values)])

    def to(self, device: torch.device) -> Shard:
        """The same with index tensors on `device`."""
        return dataclasses.replace(self, entries=self.entries.to(device))


class FlatTensors:
    """Tensors to be read by parts; of sharded ones the last that was read is kept whole.

    Reading those takes all ranks, in the same order.

    Args:
        tensors: name -> tensor; those that are whole are not copied, unless they have gaps.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._sharded = {n: t.detach() for n, t in tensors.items() if is_sharded(t)}
        whole_ones = {n: t for n, t in tensors.items() if n not in self._sharded}
        self._flat = {n: t.detach().reshape(-1) for n, t in whole_ones.items()}
        self._gathered: tuple[str, Tensor] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._flat or name in self._sharded

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Flat positions [start, stop) of a tensor, as it is; not to be written."""
        if name in self._flat:
            return self._flat[name][start:stop]
        if self._gathered is None or self._gathered[0] != name:
            self._gathered = None  # before the next one is there
            self._gathered = name, whole(self._sharded[name]).reshape(-1)
        return self._gathered[1][start:stop]


def rows_of_rank(count: int, rank: int, ranks: int) -> tuple[int, int]:
    """[first, last) of `count` rows, as FSDP2 deals them out.

    >>> [rows_of_rank(7, rank, 3) for rank in range(3)], rows_of_rank(1, 2, 3)
    ([(0, 3), (3, 6), (6, 7)], (1, 1))
    """
    share = -(-count // ranks)
    return min(rank * share, count), min((rank + 1) * share, count)


def _between(indices: Tensor, first: int, last: int) -> tuple[int, int]:
    """Where the increasing indices in [first, last) stand: [start, stop)."""
    bounds = torch.tensor([first, last], dtype=indices.dtype, device=indices.device)
    start, stop = torch.searchsorted(indices, bounds).tolist()
    return start, stop
