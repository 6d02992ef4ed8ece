"""Which storages live when: memory by part, without touching memory.

A dispatch mode sees every operation that a step makes; under `FakeTensorMode` those only compute
shapes. What an operation's kernel uses inside and gives back before it returns is not seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


@dataclasses.dataclass(eq=False)
class Allocation:
    """One storage.

    Attributes:
        num_bytes: its size.
        part: what it is counted as; may be said later (`MemoryTracker.tag`).
    """

    num_bytes: int
    part: str


class MemoryTracker(TorchDispatchMode):
    """Records every storage that comes and goes inside its block, and what it is for.

    Fake tensors hold no values. What code reads out of them is answered so that a step goes on: a
    scalar is 1 (a check for finite values is true), and all of a tensor's entries are nonzero.

    Attributes:
        part: what storages that come now are counted as.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = "other"
        self._events: list[tuple[Allocation, int]] = []
        self._live: dict[int, Allocation] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and note the storages of its results."""
        result = _answered(func, args, kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        allocation = Allocation(storage.nbytes(), self.part)
        self._live[key] = allocation
        self._events.append((allocation, 1))
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._events.append((self._live.pop(key), -1))

    @contextlib.contextmanager
    def counting_as(self, part: str) -> Iterator[None]:
        """Storages that come inside this context are of `part`."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def tag(self, tensors: Iterable[Tensor | None], part: str) -> None:
        """Say what tensors' storages are; it holds for the past too."""
        for tensor in tensors:
            if tensor is not None:
                self._note(tensor)
                self._live[tensor.untyped_storage()._cdata].part = part

    def mark(self) -> int:
        """A moment to come back to."""
        return len(self._events)

    def live(self, at: int | None = None) -> Counter[str]:
        """Bytes by part at a moment (None: now)."""
        found: Counter[str] = Counter()
        for allocation, sign in self._events[:at]:
            found[allocation.part] += sign * allocation.num_bytes
        return +found

    def peak(self, since: int = 0) -> Counter[str]:
        """Bytes by part when the most was in use, from the moment `since` on."""
        total = sum(sign * a.num_bytes for a, sign in self._events[:since])
        highest, at = total, since
        for number, (allocation, sign) in enumerate(self._events[since:], since + 1):
            total += sign * allocation.num_bytes
            if total > highest:
                highest, at = total, number
        return self.live(at)


def _answered(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation's result; of fake tensors' values, the answers that the class describes."""
    if not args or not isinstance(args[0], FakeTensor):
        return func(*args, **kwargs)
    if func is aten._local_scalar_dense.default:
        return 1
    if func is aten.nonzero.default:
        return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
    if func is aten.index.Tensor:
        args = (args[0], [_as_positions(i) for i in args[1]], *args[2:])
    return func(*args, **kwargs)


def _as_positions(index: Tensor | None) -> Tensor | None:
    """Flags as the positions of all entries."""
    if index is None or index.dtype != torch.bool:
        return index
    if index.ndim > 1:
        raise NotImplementedError("flags of more than one dimension as an index")
    return index.new_empty(index.shape, dtype=torch.int64)
