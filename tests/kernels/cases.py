"""Entries of every kind, and an index arithmetic of their order that shares no code with them."""

import math

import torch

from lit_align_kernels.entries import Entries

KINDS = (
    "all",
    "rows",
    "rows, none",
    "rows, every",
    "columns",
    "elements",
    "elements in int64",
    "elements, none",
    "elements, one",
    "elements, every",
)
KINDS_3D = tuple(kind for kind in KINDS if kind != "columns")


def elements(shape, positions):
    positions = positions.to(torch.int64)
    starts = torch.arange(math.prod(shape[:-1]) + 1) * shape[-1]
    return Entries(
        "elements",
        tuple(shape),
        positions=positions.to(torch.int32),
        row_offsets=torch.searchsorted(positions, starts),
    )


def entries_of(kind, shape, seed=0):
    """About a third of the rows or columns, about a tenth of the elements."""
    generator = torch.Generator().manual_seed(seed)
    numel, rows = math.prod(shape), math.prod(shape[:-1])

    def some(n, share):
        return torch.randperm(n, generator=generator)[: max(1, int(share * n))].sort().values

    match kind:
        case "all":
            return Entries("all", tuple(shape))
        case "rows":
            return Entries("rows", tuple(shape), rows=some(rows, 0.3))
        case "rows, none":
            return Entries("rows", tuple(shape), rows=torch.empty(0, dtype=torch.int64))
        case "rows, every":
            return Entries("rows", tuple(shape), rows=torch.arange(rows))
        case "columns":
            return Entries("rows", tuple(shape), axis=1, rows=some(shape[1], 0.3))
        case "elements":
            return elements(shape, some(numel, 0.1))
        case "elements in int64":
            found = elements(shape, some(numel, 0.1))
            found.positions = found.positions.long()
            return found
        case "elements, none":
            return elements(shape, torch.empty(0))
        case "elements, one":
            return elements(shape, torch.tensor([numel // 2]))
        case "elements, every":
            return elements(shape, torch.arange(numel))
    raise AssertionError(kind)


def flat_order(entries):
    """Row-major position of every selected entry, in the order in which it is stored: (M,)."""
    at = torch.arange(math.prod(entries.shape)).reshape(-1, entries.shape[-1])
    if entries.kind == "rows":
        return torch.cat([at[:0].reshape(-1), *_rows(at, entries)])
    return at.reshape(-1) if entries.kind == "all" else entries.positions.long()


def _rows(at, entries):
    return [at[:, r] if entries.axis == 1 else at[r] for r in entries.rows.tolist()]
