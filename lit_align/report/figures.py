"""What the report's pictures show, as plain numbers: drawn by `drawing`, testable without it."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lit_align.errors import DataError, LocalizationError

BINS_PER_DECADE = 8
LOWEST_DECADE, HIGHEST_DECADE = -46, 39  # every fp32 number
CHUNK = 1 << 22  # elements; keeps the working memory at some tens of MB
OUTSIDE = "none"

Points = tuple[Sequence[float], Sequence[float]]
Scale = Literal["share", "selected", "rank", "score", "jaccard"]


@dataclass(frozen=True)
class Curves:
    """Lines over training steps: `series` maps a line's name to its x and y values."""

    title: str
    y_label: str
    series: Mapping[str, Points]
    caption: str = ""
    x_label: str = "step"


@dataclass(frozen=True)
class Histogram:
    """Counts between edges, with the threshold that selects from the right."""

    title: str
    x_label: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    threshold: float | None = None
    caption: str = ""
    y_label: str = "entries"
    log_x: bool = True
    log_y: bool = False


@dataclass(frozen=True)
class HeatMap:
    """Numbers by row and column; None where there is no such cell.

    What the numbers are, `scale` says: `share` in [0, 1], of which `top` and more have the
    strongest colour; `selected` 1 or 0; `rank` 1 (the strongest), 2, ...; `score` any number;
    `jaccard` in [0, 1], written into the cells, `remarks` below them.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    top: float = 1.0
    caption: str = ""
    x_label: str = "block"
    value_label: str = "share selected"
    y_label: str = ""
    scale: Scale = "share"
    remarks: tuple[tuple[str, ...], ...] = ()


def density_heat_map(title: str, parameters: Sequence[Mapping[str, Any]]) -> HeatMap:
    """The share of entries that a mask selects, by module and transformer block.

    Args:
        title: Which mask it is.
        parameters: `ParameterMask.table()`: block (None outside the blocks), module, selected,
            total of every parameter.
    """
    sums: dict[tuple[str, int | None], tuple[int, int]] = {}
    for row in parameters:
        cell = (row["module"], row["block"])
        selected, total = sums.get(cell, (0, 0))
        sums[cell] = (selected + row["selected"], total + row["total"])
    modules = list(dict.fromkeys(module for module, _ in sums))
    blocks = sorted({block for _, block in sums}, key=lambda b: -1 if b is None else b)

    def share(module: str, block: int | None) -> float | None:
        selected, total = sums.get((module, block), (0, 0))
        return selected / total if total else None

    return HeatMap(
        title,
        tuple(modules),
        tuple(OUTSIDE if block is None else str(block) for block in blocks),
        tuple(tuple(share(module, block) for block in blocks) for module in modules),
        top=_top_share(list(sums.values())),
        caption="Grey: no such parameter. Column none: outside the blocks.",
    )


def _top_share(cells: Sequence[tuple[int, int]]) -> float:
    """The share that 98 % of all entries live at or below.

    Norms that are wholly selected, a few hundred entries each, must not bleach everything else.
    """
    entries = sum(total for _, total in cells)
    seen = 0
    for selected, total in sorted(cells, key=lambda cell: cell[0] / max(cell[1], 1)):
        seen += total
        if selected and seen >= 0.98 * entries:
            return selected / total
    return 1.0


def score_histogram(
    title: str, scores: Mapping[str, Tensor], threshold: float | None = None
) -> Histogram:
    """How the magnitudes of the scores spread, counted one tensor at a time.

    Args:
        title: Which scores they are.
        scores: Name to scores; may be lazy, and is read once.
        threshold: The lowest score that was selected.

    Raises:
        LocalizationError: A tensor holds NaN or infinity, or there is no score but zero.
    """
    counts = torch.zeros((HIGHEST_DECADE - LOWEST_DECADE) * BINS_PER_DECADE, dtype=torch.int64)
    zeros = total = 0
    for name in scores:
        for chunk in scores[name].detach().reshape(-1).split(CHUNK):
            magnitudes = chunk.to("cpu", torch.float64 if chunk.dtype.itemsize == 8 else None).abs()
            if not bool(torch.isfinite(magnitudes).all()):
                raise LocalizationError(f"the scores of {name} hold NaN or infinity")
            positive = magnitudes[magnitudes > 0].float()
            bins = ((positive.log10() - LOWEST_DECADE) * BINS_PER_DECADE).long()
            counts += torch.bincount(bins.clamp_(0, len(counts) - 1), minlength=len(counts))
            zeros += len(magnitudes) - len(positive)
            total += len(magnitudes)
    if zeros == total:
        raise LocalizationError(f"{title}: every score is zero")
    # The left tail is long and empty: the lowest 0.1 % of the scores share the first bin.
    first = int((counts.cumsum(0) > 0.001 * int(counts.sum())).nonzero()[0])
    last = int(counts.nonzero()[-1])
    counts[first] = counts[: first + 1].sum()
    edges = (10 ** (LOWEST_DECADE + i / BINS_PER_DECADE) for i in range(first, last + 2))
    caption = f"{total:,} scores; {100 * zeros / total:.2g} % are exactly zero and not drawn; "
    caption += "the first bar holds everything below it too."
    return Histogram(
        title, "score", tuple(edges), tuple(counts[first : last + 1].tolist()), threshold, caption
    )


def read_metrics_csv(path: Path) -> dict[str, Points]:
    """The logged values of Lightning's `metrics.csv`, by name: the steps, and the values there.

    Args:
        path: A `metrics.csv` of Lightning's CSVLogger.

    Returns:
        Name to (steps, values); empty cells, NaN and infinity are left out.

    Raises:
        DataError: the file is another one, or damaged.
    """
    try:
        return _read_series(path)
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise DataError(f"{path} is no metrics.csv of Lightning's CSVLogger: {error!r}") from error


def _read_series(path: Path) -> dict[str, Points]:
    series: dict[str, tuple[list[float], list[float]]] = {}
    with path.open(newline="", encoding="utf-8") as handle:
        for row in csv.DictReader(handle):
            step = float(row.pop("step"))
            for name, cell in row.items():
                if name != "epoch" and cell and math.isfinite(float(cell)):
                    steps, values = series.setdefault(name, ([], []))
                    steps.append(step)
                    values.append(float(cell))
    return dict(series)
