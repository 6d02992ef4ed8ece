"""Pictures by matplotlib, the `report` extra; pyplot's global state stays untouched."""

import io
from functools import singledispatch
from typing import TYPE_CHECKING, Any, Literal

from lit_align.report.figures import Curves, HeatMap, Histogram
from lit_align.report.heat_maps import paint_heat_map, size_of_heat_map
from lit_align.report.text import literal, paragraph

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, ACCENT, MUTED = "#1f2933", "#c2410c", "#9aa5b1"
LINES = ("#1d4ed8", "#c2410c", "#047857", "#a855f7", "#db2777", "#64748b")
MAX_POINTS = 1500  # of a line; more only make the file bigger
MAX_MARKED_POINTS = 25
SMALL = 8.5  # pt
MAX_LINES_INSIDE = 3  # with more, the legend stands beside the lines that it would hide
LETTERS_PER_INCH, LINE_INCHES = 15, 0.17  # of a caption
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
    """The figure as one SVG document, without its title.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    return _render(figure, "svg", titled=False).decode()


def picture(figure: Curves | Histogram | HeatMap, kind: Literal["svg", "png"]) -> bytes:
    """The figure with its title and caption, as the bytes of a file.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    return _render(figure, kind, titled=True)


def _render(figure: Curves | Histogram | HeatMap, kind: str, *, titled: bool) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        width, height = size_inches(figure)
        caption = paragraph(figure.caption, int(LETTERS_PER_INCH * width)) if titled else []
        size = (width, height + titled * 2 * LINE_INCHES + LINE_INCHES * len(caption))
        canvas = Figure(figsize=size, layout="constrained")
        axes = canvas.add_subplot()
        _paint(figure, axes)
        if titled:
            canvas.suptitle(literal(figure.title), x=0.01, ha="left", fontsize=10.5)
        if caption:
            canvas.supxlabel("\n".join(caption), x=0.01, ha="left", fontsize=SMALL - 0.5)
        buffer = io.BytesIO()
        metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {}
        canvas.savefig(buffer, format=kind, metadata=metadata, dpi=144)
    return buffer.getvalue()


def size_inches(figure: Curves | Histogram | HeatMap) -> tuple[float, float]:
    """Width and height without title and caption."""
    if isinstance(figure, HeatMap):
        return size_of_heat_map(figure)
    if isinstance(figure, Curves) and len(figure.series) > MAX_LINES_INSIDE:
        return 8.4, max(3.0, 0.6 + 0.2 * len(figure.series))
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
            label=literal(name),
            color=LINES[index % len(LINES)],
            linestyle="-" if index < len(LINES) else "--",
            linewidth=1.6,
            marker="o" if len(x) <= MAX_MARKED_POINTS else "",
            markersize=3.5,
        )
    axes.set(xlabel=literal(figure.x_label), ylabel=literal(figure.y_label))
    axes.margins(x=0.02)
    if len(figure.series) > MAX_LINES_INSIDE:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    elif figure.series:
        axes.legend(loc="best")


@_paint.register(Histogram)
def _paint_histogram(figure: Histogram, axes: "Axes") -> None:
    axes.stairs(figure.counts, figure.edges, fill=True, color="#93b4f5")
    if figure.log_x:
        axes.set_xscale("log")
    axes.set(xlabel=literal(figure.x_label), ylabel=literal(figure.y_label))
    if figure.log_y:
        axes.set_yscale("symlog", linthresh=1)
    else:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useMathText=True)
    axes.set_ylim(0, None)
    if figure.threshold:
        axes.axvspan(figure.threshold, figure.edges[-1], color=ACCENT, alpha=0.10, lw=0)
        label = f"threshold {figure.threshold:.3g}; selected to the right"
        axes.axvline(figure.threshold, color=ACCENT, linewidth=1.5, label=label)
        axes.legend(loc="upper left")


@_paint.register(HeatMap)
def _paint_heat_map(figure: HeatMap, axes: "Axes") -> None:
    paint_heat_map(figure, axes)
