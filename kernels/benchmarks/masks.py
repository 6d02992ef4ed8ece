"""Random selections for benchmarks."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from lit_align_kernels.entries import Entries

SHARE = 0.1


def selections(
    shapes: Iterable[tuple[int, ...]], device: torch.device
) -> dict[str, dict[tuple[int, ...], Entries]]:
    """What is timed of masks over many weights: name of the case → entries by shape."""
    kinds = {"10 % of elements": random_elements, "10 % of rows": random_rows}
    return {
        name: {shape: select(shape, SHARE, device) for shape in set(shapes)}
        for name, select in kinds.items()
    }


def random_elements(shape: tuple[int, ...], share: float, device: torch.device) -> Entries:
    """Every element selected with probability `share`, the same ones in every run."""
    generator = torch.Generator().manual_seed(0)
    positions = (torch.rand(math.prod(shape), generator=generator) < share).nonzero()[:, 0]
    starts = torch.arange(math.prod(shape[:-1]) + 1) * shape[-1]
    offsets = torch.searchsorted(positions, starts)
    entries = Entries("elements", shape, positions=positions, row_offsets=offsets)
    return entries.to(device)


def random_rows(
    shape: tuple[int, ...], share: float, device: torch.device, run: int = 1
) -> Entries:
    """A share of the rows, in aligned runs of `run` rows (64: attention heads)."""
    generator = torch.Generator().manual_seed(0)
    runs = math.prod(shape[:-1]) // run
    chosen = torch.randperm(runs, generator=generator)[: max(1, round(share * runs))].sort().values
    rows = (chosen[:, None] * run + torch.arange(run)).reshape(-1)
    return Entries("rows", shape, rows=rows).to(device)
