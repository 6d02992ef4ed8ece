"""Count the bytes that a Triton kernel moves, by watching the interpreter's loads and stores.

    with interpreted(), traffic() as seen:
        kernel[grid](...)
    seen.moved, seen.unique, seen.sectors, seen.out_of_bounds, seen.races

The interpreter reads and writes stray addresses silently and runs programs one after the other, so
neither a bad bound nor a race shows in values: here both do. No cache is modelled: what L2 serves
is counted, and so is every program's own sector where neighbours share one.

What a race is: bytes that two programs store, or one stores and another loads, and bytes that two
lanes of one store have in common. Not seen are races of one program's warps across two of its
accesses (a load whose place another warp overwrites further down): barriers are not modelled.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter as triton_interpreter

Builder = triton_interpreter.InterpreterBuilder
SECTOR_BYTES = 32
ACCESS_BYTES = 16  # the widest access: a load may begin at the multiple of it before its tensor
STRAY = "outside every argument"


class OutOfBoundsError(RuntimeError):
    """A kernel touched memory that belongs to none of its tensors."""


@dataclasses.dataclass(frozen=True)
class TrafficCase:
    """One call whose traffic is known.

    Attributes:
        name: what is special about it.
        call: runs the operation on CPU tensors, in the interpreter.
        minimum_bytes: what any implementation has to move.
        tensors: tensors that the kernel reaches through tables of pointers, by name.
        extra_bytes: what torch moves around the kernel: sectors read and bytes written.
    """

    name: str
    call: Callable[[], Any]
    minimum_bytes: int
    tensors: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    extra_bytes: int = 0


@dataclasses.dataclass
class Counts:
    """Traffic of one tensor in one launch, in bytes.

    Attributes:
        loaded: of active lanes, every load counted.
        stored: likewise.
        atomic: likewise.
        sectors: 32-byte sectors that each access of each program touches, in bytes.
        unique: distinct bytes, loads and stores counted apart.
    """

    loaded: int = 0
    stored: int = 0
    atomic: int = 0
    sectors: int = 0
    unique: int = 0
    _loads: list[tuple[np.ndarray, int]] = dataclasses.field(default_factory=list, repr=False)
    _stores: list[tuple[np.ndarray, int]] = dataclasses.field(default_factory=list, repr=False)

    def add(self, kind: str, addresses: np.ndarray, size: int) -> None:
        """Count one access of one program."""
        distinct = np.unique(addresses)
        first, last = distinct >> np.uint64(5), (distinct + np.uint64(size - 1)) >> np.uint64(5)
        self.sectors += SECTOR_BYTES * np.unique(np.concatenate([first, last])).size
        amount = addresses.size * size
        self.loaded += amount if kind == "load" else 0
        self.stored += amount if kind == "store" else 0
        self.atomic += amount if kind == "atomic" else 0
        if kind != "store":
            self._loads.append((distinct, size))
        if kind != "load":
            self._stores.append((distinct, size))

    def close(self) -> None:
        """Count distinct bytes, and let go of the addresses."""
        self.unique = _distinct_bytes(self._loads) + _distinct_bytes(self._stores)
        self._loads, self._stores = [], []


def _distinct_bytes(accesses: list[tuple[np.ndarray, int]]) -> int:
    total = 0
    for size in {size for _, size in accesses}:
        total += size * np.unique(np.concatenate([a for a, s in accesses if s == size])).size
    return total


@dataclasses.dataclass
class Launch:
    """What one launch did.

    Attributes:
        kernel: its name.
        tensors: traffic by tensor.
        programs: how many programs touched memory.
        out_of_bounds: lanes whose address lies in none of the tensors.
        races: elements stored by two programs, stored by one and loaded by another, or stored by
            two lanes of one access.
    """

    kernel: str
    tensors: dict[str, Counts]
    programs: int = 0
    out_of_bounds: int = 0
    races: int = 0


class _Intervals:
    """Disjoint ranges of addresses."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        merged: list[list[int]] = []
        for low, high in sorted(ranges):
            if merged and low < merged[-1][1]:
                merged[-1][1] = max(high, merged[-1][1])
            else:
                merged.append([low, high])
        self.low = np.array([low for low, _ in merged], np.uint64)
        self.high = np.array([high for _, high in merged], np.uint64)

    def find(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """The range that `size` bytes at each address lie in, -1 where they lie in none."""
        at = np.searchsorted(self.low, addresses, side="right").astype(np.int64) - 1
        inside = at >= 0
        inside[inside] = addresses[inside] + np.uint64(size) <= self.high[at[inside]]
        return np.where(inside, at, -1)


def _storage_range(tensor: torch.Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _extent(tensor: torch.Tensor, kind: str) -> tuple[int, int]:
    """What an access may touch: from the first element to the last, gaps between rows included.

    A load may do a little more, within the storage: begin at the multiple of 16 bytes before, and
    read the gap behind the last row.
    """
    strides = list(zip(tensor.shape, tensor.stride(), strict=True))
    start, size = tensor.data_ptr(), tensor.element_size()
    elements = 1 + sum((length - 1) * stride for length, stride in strides)
    if kind != "load":
        return start, start + elements * size
    elements = max([elements, *(length * stride for length, stride in strides)])
    low, high = _storage_range(tensor)
    return max(start // ACCESS_BYTES * ACCESS_BYTES, low), min(start + elements * size, high)


@dataclasses.dataclass(frozen=True)
class _Access:
    addresses: np.ndarray
    size: int
    program: int

    def units(self, unit: int) -> np.ndarray:
        """Addresses of its parts of `unit` bytes each."""
        if self.size == unit:
            return self.addresses
        parts = np.arange(0, self.size, unit, dtype=np.uint64)
        return (self.addresses[:, None] + parts).reshape(-1)


class _Recorder:
    """One launch under way."""

    def __init__(self, kernel: str, tensors: dict[str, torch.Tensor]) -> None:
        used = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
        self.storages = _Intervals({_storage_range(t) for t in used.values()})
        self.extents = {
            kind: _Intervals(_extent(t, kind) for t in used.values()) for kind in ("load", "store")
        }
        self.names: dict[int, str] = {-1: STRAY}
        for name, tensor in used.items():
            at = self.storages.find(np.array([tensor.data_ptr()], np.uint64), 1)
            self.names.setdefault(int(at[0]), name)
        self.launch = Launch(kernel, {name: Counts() for name in self.names.values()})
        self.programs: set[int] = set()
        self.writes: dict[int, list[_Access]] = collections.defaultdict(list)
        self.reads: dict[int, list[_Access]] = collections.defaultdict(list)

    def access(self, builder: Any, kind: str, pointers: Any, mask: Any) -> None:
        addresses = _active_addresses(pointers, mask)
        if not addresses.size:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        program = _program(builder)
        self.programs.add(program)
        extents = self.extents["load" if kind == "load" else "store"]
        inside = extents.find(addresses, size) >= 0
        owner = np.where(inside, self.storages.find(addresses, size), -1)
        for who in np.unique(owner).tolist():
            mine = addresses[owner == who]
            self.launch.tensors[self.names[who]].add(kind, mine, size)
            if kind != "atomic":
                accesses = self.writes if kind == "store" else self.reads
                accesses[who].append(_Access(mine, size, program))
        stray = int((~inside).sum())
        self.launch.out_of_bounds += stray
        if stray:
            raise OutOfBoundsError(
                f"{self.launch.kernel}: {stray} of {addresses.size} lanes of a {kind} in program "
                f"{program} lie outside every tensor"
            )

    def close(self) -> Launch:
        for counts in self.launch.tensors.values():
            counts.close()
        self.launch.programs = len(self.programs)
        self.launch.races = sum(_races(w, self.reads[who]) for who, w in self.writes.items())
        return self.launch


def _active_addresses(pointers: Any, mask: Any) -> np.ndarray:
    addresses = np.asarray(pointers.data).astype(np.uint64)
    if mask is None:
        return addresses.reshape(-1)
    active = np.asarray(mask.data).astype(bool)
    addresses, active = np.broadcast_arrays(addresses, active)
    return addresses[active].reshape(-1)


def _program(builder: Any) -> int:
    x, y, z = getattr(builder, "grid_idx", (0, 0, 0))
    width, height, _ = getattr(builder, "grid_dim", (1, 1, 1))
    return x + width * (y + height * z)


def _races(writes: list[_Access], reads: list[_Access]) -> int:
    """Races on one storage, counted in the smallest element that it is accessed by."""
    found = sum(_shared_by_lanes(access) for access in writes)
    if len({access.program for access in [*writes, *reads]}) == 1:
        return found
    unit = _common_unit([*writes, *reads])
    address, program = _sorted_by_address(writes, unit)
    twice = (address[1:] == address[:-1]) & (program[1:] != program[:-1])
    found += np.unique(address[1:][twice]).size
    if reads:
        read, reader = _sorted_by_address(reads, unit)
        at = np.searchsorted(address, read)
        at[at == address.size] = 0
        found += np.unique(read[(address[at] == read) & (program[at] != reader)]).size
    return found


def _shared_by_lanes(access: _Access) -> int:
    """Lanes of one store that overlap another lane of it."""
    return int((np.diff(np.sort(access.addresses)) < access.size).sum())


def _common_unit(accesses: list[_Access]) -> int:
    """The smallest element's size, where all addresses are multiples of it; else a byte."""
    unit = min(access.size for access in accesses)
    even = all(not (a.size % unit or (a.addresses % np.uint64(unit)).any()) for a in accesses)
    return unit if even else 1


def _sorted_by_address(accesses: list[_Access], unit: int) -> tuple[np.ndarray, np.ndarray]:
    parts = [access.units(unit) for access in accesses]
    address = np.concatenate(parts)
    program = np.concatenate(
        [np.full(part.size, a.program) for part, a in zip(parts, accesses, strict=True)]
    )
    order = np.lexsort((program, address))
    return address[order], program[order]


class Traffic:
    """What all launches inside `traffic()` did."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.launches: list[Launch] = []
        self._known = tensors
        self._recorder: _Recorder | None = None

    def begin(self, kernel: str, arguments: dict[str, Any]) -> None:
        """A launch starts; its tensors are the arguments and those named to `traffic`."""
        tensors = dict(self._known)
        for name, value in arguments.items():
            tensors |= dict(_tensors_in(name, value))
        self._recorder = _Recorder(kernel, tensors)

    def access(self, builder: Any, kind: str, pointers: Any, mask: Any) -> None:
        """One load, store or atomic of one program."""
        assert self._recorder is not None
        self._recorder.access(builder, kind, pointers, mask)

    def end(self) -> None:
        """The launch is over."""
        assert self._recorder is not None
        self.launches.append(self._recorder.close())
        self._recorder = None

    def by_tensor(self) -> dict[str, Counts]:
        """Traffic by tensor over all launches; tensors that nothing touched are left out."""
        found: dict[str, Counts] = {}
        for launch in self.launches:
            for name, counts in launch.tensors.items():
                if counts.loaded or counts.stored or counts.atomic:
                    total = found.setdefault(name, Counts())
                    for field in ("loaded", "stored", "atomic", "sectors", "unique"):
                        setattr(total, field, getattr(total, field) + getattr(counts, field))
        return found

    def _total(self, *fields: str) -> int:
        return sum(getattr(c, field) for c in self.by_tensor().values() for field in fields)

    @property
    def moved(self) -> int:
        """Bytes by the program text: every active lane of every access."""
        return self._total("loaded", "stored", "atomic")

    @property
    def unique(self) -> int:
        """Distinct bytes: what has to be moved where everything else comes from a cache."""
        return self._total("unique")

    @property
    def sectors(self) -> int:
        """Bytes of the 32-byte sectors that the accesses touch."""
        return self._total("sectors")

    @property
    def out_of_bounds(self) -> int:
        """Lanes outside every tensor (an access that has one raises as well)."""
        return sum(launch.out_of_bounds for launch in self.launches)

    @property
    def races(self) -> int:
        """Elements on which two programs of a launch, or two lanes of a store, do not agree."""
        return sum(launch.races for launch in self.launches)


def _tensors_in(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    value = getattr(value, "base", value)
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, tuple):
        for i, part in enumerate(value):
            yield from _tensors_in(f"{name}[{i}]", part)


def _watched(seen: Traffic) -> dict[tuple[Any, str], Any]:
    """Replacements of the interpreter's methods: watch, then do as before."""

    def watch(kind: str, original: Any, mask_at: int | None) -> Any:
        def access(self: Any, *args: Any, **kwargs: Any) -> Any:
            pointers = next(a for a in args if _is_pointer(a))
            seen.access(self, kind, pointers, None if mask_at is None else args[mask_at])
            return original(self, *args, **kwargs)

        return access

    executor = triton_interpreter.GridExecutor

    def initialise(self: Any, arguments: Any, options: Any) -> Any:
        on_host, options = before_initialise(self, arguments, options)
        seen.begin(
            self.fn.__name__, {**dict(zip(self.arg_names, on_host, strict=False)), **options}
        )
        return on_host, options

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = before_call(self, *args, **kwargs)
        seen.end()
        return result

    before_initialise, before_call = executor._init_args_hst, executor.__call__
    return {
        (Builder, "create_masked_load"): watch("load", Builder.create_masked_load, 1),
        (Builder, "create_masked_store"): watch("store", Builder.create_masked_store, 2),
        (Builder, "create_atomic_rmw"): watch("atomic", Builder.create_atomic_rmw, 3),
        (Builder, "create_atomic_cas"): watch("atomic", Builder.create_atomic_cas, None),
        (executor, "_init_args_hst"): initialise,
        (executor, "__call__"): call,
    }


def _is_pointer(value: Any) -> bool:
    return hasattr(value, "get_element_ty") and "pointer" in type(value.dtype.scalar).__name__


@contextlib.contextmanager
def traffic(tensors: dict[str, torch.Tensor] | None = None) -> Iterator[Traffic]:
    """Watch every kernel that is launched inside, in the interpreter.

    Args:
        tensors: those that kernels reach through tables of pointers, by name.

    Raises:
        OutOfBoundsError: from the launch, where a lane touches memory of no tensor.
    """
    seen = Traffic(tensors or {})
    replaced = _watched(seen)
    before = {(owner, name): getattr(owner, name) for owner, name in replaced}
    for (owner, name), method in replaced.items():
        setattr(owner, name, method)
    try:
        yield seen
    finally:
        for (owner, name), method in before.items():
            setattr(owner, name, method)
