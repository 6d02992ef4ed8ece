"""Which tiles of `aᵀ b` hold selected entries, and how large the tiles are."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from lit_align_kernels.entries import Entries

RUN = 16  # selected rows that come in aligned runs of this length need no packing
GROUP = 8  # tile rows that are worked off together, so that their part of `b` stays in L2
CHUNK = 1 << 24  # positions that are looked at together

Arithmetic = Literal["half", "tf32", "ieee"]


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Shape of one program's work.

    Attributes:
        rows: of the weight, in a tile.
        columns: of the weight, in a tile; a multiple of 32.
        tokens: summed in one step.
        warps: of a program.
        stages: of software pipelining.
    """

    rows: int
    columns: int
    tokens: int
    warps: int
    stages: int


# Compiled for each target without spills; the choice among them is a model (`plan`) that no GPU
# has confirmed yet. wgmma and tcgen05 want 64 rows; sm_120 has 99 KiB and gfx942 64 KiB of shared
# memory.
TILINGS: dict[str, dict[Arithmetic, tuple[Tiling, ...]]] = {
    "sm_80": {
        "half": (Tiling(128, 128, 32, 8, 4), Tiling(64, 64, 64, 4, 4), Tiling(32, 32, 64, 4, 4)),
        "tf32": (Tiling(128, 128, 32, 8, 3), Tiling(64, 64, 32, 4, 4), Tiling(32, 32, 32, 4, 4)),
        "ieee": (Tiling(64, 64, 16, 8, 3), Tiling(32, 32, 32, 4, 3)),
    },
    "sm_90": {
        # On an H100, 10 % of the elements of 4096², 8192 tokens: 0.45 ms, with 3 stages 0.51.
        "half": (Tiling(128, 128, 64, 8, 4), Tiling(64, 64, 64, 4, 4), Tiling(64, 32, 64, 4, 4)),
        "tf32": (Tiling(128, 128, 32, 8, 3), Tiling(64, 64, 32, 4, 4), Tiling(64, 32, 32, 4, 4)),
        "ieee": (Tiling(64, 64, 16, 8, 3), Tiling(32, 32, 32, 4, 3)),
    },
    "sm_100": {
        "half": (Tiling(128, 128, 64, 8, 3), Tiling(64, 64, 64, 8, 4), Tiling(64, 32, 64, 4, 4)),
        "tf32": (Tiling(128, 128, 32, 8, 3), Tiling(64, 64, 32, 4, 4), Tiling(64, 32, 32, 4, 4)),
        "ieee": (Tiling(64, 64, 16, 8, 3), Tiling(32, 32, 32, 4, 3)),
    },
    "sm_120": {
        "half": (Tiling(128, 128, 32, 8, 3), Tiling(64, 64, 64, 4, 3), Tiling(32, 32, 64, 4, 4)),
        "tf32": (Tiling(128, 128, 32, 8, 3), Tiling(64, 64, 32, 4, 3), Tiling(32, 32, 32, 4, 4)),
        "ieee": (Tiling(64, 64, 16, 8, 3), Tiling(32, 32, 32, 4, 3)),
    },
    "gfx942": {
        "half": (Tiling(128, 64, 64, 4, 2), Tiling(64, 64, 64, 4, 2), Tiling(32, 32, 64, 4, 2)),
        "tf32": (Tiling(128, 64, 32, 4, 2), Tiling(64, 64, 32, 4, 2), Tiling(32, 32, 32, 4, 2)),
        "ieee": (Tiling(64, 64, 32, 4, 2), Tiling(32, 32, 32, 4, 2)),
    },
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one launch needs to know about the mask; built once for it.

    Attributes:
        tiling: the tile's shape.
        tiles: (T, 2) int32: tile row and tile column of every tile that holds a selected entry.
        starts: (T, rows of a tile) place in the compact order of the first entry that is selected
            in each row of each tile, int32 where it fits, else int64; `elements` only.
        runs: (R rounded up to whole tiles,) int32 selected rows, the last run repeated, where they
            come in runs; `rows` only.
        packed: (R rounded up to 8,) int64 selected rows, the last one repeated, where they do not;
            `rows` only.
    """

    tiling: Tiling
    tiles: Tensor
    starts: Tensor | None = None
    runs: Tensor | None = None
    packed: Tensor | None = None


def plan(
    entries: Entries, tilings: tuple[Tiling, ...], processors: int, device: torch.device
) -> Plan:
    """The plan for `entries`, with the tiling that is expected to be fastest. Cached on `entries`.

    A tile's time is taken to grow with the data it reads, rows + columns, and tiles to run in waves
    of `processors`: large tiles read less, small ones skip more of a mask of blocks and keep more
    processors busy where the weight is small.
    """
    cache = entries.cache.setdefault("masked_weight_grad", {})
    key = (tilings, processors)
    if key not in cache:
        tiles = {tiling: _tiles(entries, tiling, device) for tiling in tilings}
        best = min(tilings, key=lambda t: _cost(t, tiles[t].shape[0], processors))
        cache[key] = _with_tables(entries, best, tiles[best])
    return cache[key]


def _cost(tiling: Tiling, tiles: int, processors: int) -> tuple[int, int]:
    """Data that a processor reads one tile after the other, then entries that are computed."""
    waves = math.ceil(tiles / processors)
    return waves * (tiling.rows + tiling.columns), tiles * tiling.rows * tiling.columns


def _selected_shape(entries: Entries) -> tuple[int, int]:
    """Rows and columns that tiles are laid over: of the weight, or of its selected rows alone."""
    if entries.kind != "rows":
        return entries.shape[0], entries.shape[1]
    assert entries.rows is not None
    return entries.rows.numel(), entries.row_length


def _tiles(entries: Entries, tiling: Tiling, device: torch.device) -> Tensor:
    """(T, 2) int32 tiles that hold a selected entry, `GROUP` tile rows at a time."""
    rows, columns = _selected_shape(entries)
    down, across = math.ceil(rows / tiling.rows), math.ceil(columns / tiling.columns)
    if entries.kind == "elements":
        assert entries.positions is not None
        used = torch.zeros(down * across, dtype=torch.bool, device=device)
        for positions in entries.positions.split(CHUNK):
            row, column = positions // columns, positions % columns
            used[row // tiling.rows * across + column // tiling.columns] = True
        tile = used.nonzero()[:, 0]
    else:
        tile = torch.arange(down * across, device=device)
    row, column = tile // across, tile % across
    order = ((row // GROUP * across + column) * GROUP + row % GROUP).argsort()
    return torch.stack([row, column], dim=1)[order].to(torch.int32)


def _with_tables(entries: Entries, tiling: Tiling, tiles: Tensor) -> Plan:
    if entries.kind == "elements":
        return Plan(tiling, tiles, starts=_starts(entries, tiling, tiles))
    if entries.kind == "all" or not entries.numel:
        return Plan(tiling, tiles)
    assert entries.rows is not None
    if _in_runs(entries.rows):
        return Plan(tiling, tiles, runs=_padded(entries.rows, tiling.rows, RUN).to(torch.int32))
    return Plan(tiling, tiles, packed=packed_rows(entries))


def packed_rows(entries: Entries) -> Tensor:
    """The selected rows, the last one repeated up to a multiple of 8. Made once."""
    if "packed rows" not in entries.cache:
        assert entries.rows is not None
        entries.cache["packed rows"] = _padded(entries.rows, 8, 1)
    return entries.cache["packed rows"]


def _starts(entries: Entries, tiling: Tiling, tiles: Tensor) -> Tensor:
    """(T, rows of a tile): how many selected positions precede each row of each tile."""
    positions, columns = entries.positions, entries.shape[1]
    assert positions is not None
    dtype = torch.int32 if positions.numel() < 2**31 else torch.int64
    starts = torch.empty(len(tiles), tiling.rows, dtype=dtype, device=tiles.device)
    within = torch.arange(tiling.rows, device=tiles.device)
    step = max(1, CHUNK // tiling.rows)
    for first in range(0, len(tiles), step):
        row, column = tiles[first : first + step].long().unbind(1)
        corner = (row[:, None] * tiling.rows + within) * columns
        corner += column[:, None] * tiling.columns
        # Rows past the end hold nothing: their start is never used, but has to fit the dtype.
        corner.clamp_(max=math.prod(entries.shape) - 1)
        starts[first : first + step] = torch.searchsorted(positions, corner.to(positions.dtype))
    return starts


def _in_runs(rows: Tensor) -> bool:
    """Whether the increasing `rows` are whole aligned runs of `RUN` rows."""
    if rows.numel() % RUN:
        return False
    runs = rows.view(-1, RUN)
    return bool(((runs[:, 0] % RUN == 0) & (runs[:, -1] - runs[:, 0] == RUN - 1)).all())


def _padded(rows: Tensor, multiple: int, run: int) -> Tensor:
    """`rows` up to a multiple of `multiple`, the last `run` of them repeated."""
    missing = -rows.numel() % multiple
    return torch.cat([rows, rows[-run:].repeat(math.ceil(missing / run))[:missing]])
