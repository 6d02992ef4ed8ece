"""How a `HeatMap` is painted: colours, cells and colour bar for each scale."""

from typing import TYPE_CHECKING, Any

import numpy as np

from lit_align.report.figures import HeatMap
from lit_align.report.text import literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ABSENT_CELL, CHOSEN, UNCHOSEN = "#eceff3", "#1d4ed8", "#cbd5e1"
MAX_COLUMN_LABELS = 40
LONG_COLUMN_NAME = 4  # letters; longer ones stand upright
SMALL = 8.5  # pt
LAST_DARK_INK = 0.6  # of a cell in [0, 1]
COLOURS = {"share": "YlGnBu", "rank": "YlGnBu_r", "score": "YlGnBu", "jaccard": "YlGnBu"}


def size_of_heat_map(figure: HeatMap) -> tuple[float, float]:
    """Width and height in inches."""
    cell = 0.62 if figure.scale == "jaccard" else 0.27
    labels = 0.075 * max((len(literal(name)) for name in figure.rows), default=0)
    width = min(12.0, max(6.0, 1.3 + max(1.5, labels) + cell * len(figure.columns)))
    longest = max((len(literal(name)) for name in figure.columns), default=0)
    names = 0.055 * longest if longest > LONG_COLUMN_NAME else 0.0
    return width, max(2.2, 1.0 + max(0.25, 0.75 * cell) * len(figure.rows) + names)


def paint_heat_map(figure: HeatMap, axes: "Axes") -> None:
    """Cells, labels, and what says how the colours are to be read."""
    cells = np.array(figure.values, dtype=float).reshape(len(figure.rows), len(figure.columns))
    low, high = _limits(figure, cells)
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(cells),  # None became NaN
        cmap=_colours(figure),
        vmin=low,
        vmax=high,
        edgecolors="white",
        linewidth=0.6,
    )
    _label_cells(figure, axes)
    if figure.scale == "selected":
        _add_legend(axes)
        return
    if figure.scale == "jaccard":
        _write_numbers(figure, cells, axes)
    exceeds = bool(np.nanmax(cells, initial=low) > high)
    root: Any = axes.get_figure(root=True)
    bar = root.colorbar(
        mesh, ax=axes, extend="max" if exceeds else "neither", fraction=0.04, pad=0.02
    )
    if figure.scale == "share":
        bar.ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")
    if figure.scale == "rank":
        bar.ax.invert_yaxis()
    bar.ax.tick_params(labelsize=SMALL)
    bar.set_label(literal(figure.value_label))
    bar.outline.set_visible(False)


def _colours(figure: HeatMap) -> Any:
    import matplotlib
    from matplotlib.colors import ListedColormap

    if figure.scale == "selected":
        return ListedColormap([UNCHOSEN, CHOSEN]).with_extremes(bad=ABSENT_CELL)
    return matplotlib.colormaps[COLOURS[figure.scale]].with_extremes(bad=ABSENT_CELL)


def _limits(figure: HeatMap, cells: np.ndarray) -> tuple[float, float]:
    if figure.scale == "share":
        return 0.0, figure.top
    known = cells[~np.isnan(cells)]
    if figure.scale in ("selected", "jaccard") or known.size == 0:
        return 0.0, 1.0
    low, high = (1.0 if figure.scale == "rank" else float(known.min())), float(known.max())
    return low, high if high > low else low + 1.0


def _label_cells(figure: HeatMap, axes: "Axes") -> None:
    """Name rows and columns at the middle of their cells, the first row on top."""
    axes.invert_yaxis()
    axes.set_facecolor(ABSENT_CELL)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=SMALL)
    step = 1 + len(figure.columns) // MAX_COLUMN_LABELS
    names = [literal(name) for name in figure.columns[::step]]
    upright = any(len(name) > LONG_COLUMN_NAME for name in names)
    axes.set_xticks(
        [i + 0.5 for i in range(0, len(figure.columns), step)], names, rotation=90 * upright
    )
    axes.set_yticks([i + 0.5 for i in range(len(figure.rows))], [literal(n) for n in figure.rows])
    axes.set_xlabel(literal(figure.x_label))
    axes.set_ylabel(literal(figure.y_label))


def _write_numbers(figure: HeatMap, cells: np.ndarray, axes: "Axes") -> None:
    for (row, column), value in np.ndenumerate(cells):
        if np.isnan(value):
            continue
        remark = figure.remarks[row][column] if figure.remarks else ""
        ink = "white" if value > LAST_DARK_INK else "#1f2933"
        place: Any = {"ha": "center", "color": ink}
        middle = row + (0.4 if remark else 0.5)
        axes.text(column + 0.5, middle, f"{value:.2f}", va="center", fontsize=SMALL, **place)
        axes.text(
            column + 0.5, row + 0.72, literal(remark), va="center", fontsize=SMALL - 2, **place
        )


def _add_legend(axes: "Axes") -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=CHOSEN, label="selected"), Patch(color=UNCHOSEN, label="not selected")]
    axes.legend(
        handles=patches, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.2
    )
