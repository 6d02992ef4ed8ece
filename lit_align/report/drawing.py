"""Pictures as SVG by matplotlib, the `report` extra; pyplot's global state stays untouched."""

import io
from functools import singledispatch
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_align.report.figures import Curves, HeatMap, Histogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, ACCENT, MUTED, ABSENT_CELL = "#1f2933", "#c2410c", "#9aa5b1", "#eceff3"
LINES = ("#1d4ed8", "#c2410c", "#047857", "#7c3aed", "#b45309", "#0e7490")
MAX_POINTS = 1500  # of a line; more only make the file bigger
MAX_MARKED_POINTS = 25
SMALL = 8.5  # pt
STYLE: Any = {  # matplotlib's type for this is a Literal of every key it knows
    "svg.fonttype": "path",  # the report looks the same on a machine without our fonts
    "svg.hashsalt": "lit-align",  # the same numbers give the same bytes
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": SMALL + 0.5,
}


def draw(figure: Curves | Histogram | HeatMap) -> str:
    """The figure as one SVG document.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        canvas = Figure(figsize=_size_inches(figure), layout="constrained")
        _paint(figure, canvas.add_subplot())
        text = io.StringIO()
        canvas.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _size_inches(figure: Curves | Histogram | HeatMap) -> tuple[float, float]:
    if isinstance(figure, HeatMap):
        width = min(12.0, max(6.0, 2.8 + 0.27 * len(figure.columns)))
        return width, max(2.2, 1.0 + 0.25 * len(figure.rows))
    return 5.6, 3.0


@singledispatch
def _paint(figure: object, axes: "Axes") -> None:
    raise TypeError(f"{type(figure).__name__} is not a figure")


@_paint.register(Curves)
def _paint_curves(figure: Curves, axes: "Axes") -> None:
    for index, (name, (x, y)) in enumerate(figure.series.items()):
        stride = max(1, len(x) // MAX_POINTS)
        axes.plot(
            x[::stride],
            y[::stride],
            label=name,
            color=LINES[index % len(LINES)],
            linestyle="-" if index < len(LINES) else "--",
            linewidth=1.6,
            marker="o" if len(x) <= MAX_MARKED_POINTS else "",
            markersize=3.5,
        )
    axes.set(xlabel=figure.x_label, ylabel=figure.y_label)
    axes.margins(x=0.02)
    if figure.series:
        axes.legend(loc="best")


@_paint.register(Histogram)
def _paint_histogram(figure: Histogram, axes: "Axes") -> None:
    axes.stairs(figure.counts, figure.edges, fill=True, color="#93b4f5")
    axes.set_xscale("log")
    axes.set(xlabel=figure.x_label, ylabel="entries", ylim=(0, None))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useMathText=True)
    if figure.threshold:
        axes.axvspan(figure.threshold, figure.edges[-1], color=ACCENT, alpha=0.10, lw=0)
        label = f"threshold {figure.threshold:.3g}; selected to the right"
        axes.axvline(figure.threshold, color=ACCENT, linewidth=1.5, label=label)
        axes.legend(loc="upper left")


@_paint.register(HeatMap)
def _paint_heat_map(figure: HeatMap, axes: "Axes") -> None:
    import matplotlib

    cells = np.array(figure.values, dtype=float)  # None becomes NaN
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(cells),
        cmap=matplotlib.colormaps["YlGnBu"].with_extremes(bad=ABSENT_CELL),
        vmin=0,
        vmax=figure.top,
        edgecolors="white",
        linewidth=0.6,
    )
    _label_cells(figure, axes)
    exceeds = bool(np.nanmax(cells, initial=0.0) > figure.top)
    bar = axes.get_figure(root=True).colorbar(  # type: ignore[union-attr]
        mesh, ax=axes, extend="max" if exceeds else "neither", fraction=0.04, pad=0.02
    )
    bar.ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")
    bar.ax.tick_params(labelsize=SMALL)
    bar.set_label(figure.value_label)
    bar.outline.set_visible(False)  # type: ignore[operator]


def _label_cells(figure: HeatMap, axes: "Axes") -> None:
    """Name rows and columns at the middle of their cells, the first row on top."""
    axes.invert_yaxis()
    axes.set_facecolor(ABSENT_CELL)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=SMALL)
    step = 1 + len(figure.columns) // 40
    columns = range(0, len(figure.columns), step)
    axes.set_xticks([i + 0.5 for i in columns], figure.columns[::step])
    axes.set_yticks([i + 0.5 for i in range(len(figure.rows))], figure.rows)
    axes.set_xlabel(figure.x_label)
