"""Plots of `lit-align bench`: one PNG for every kernel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_align.report.drawing import ACCENT, MUTED, STYLE
from lit_align_kernels.benchmarks import Measurement
from lit_align_kernels.benchmarks.case import OURS

BAR_INCHES = 0.32


def draw_measurements(found: Sequence[Measurement], folder: Path) -> list[Path]:
    """Median times of every implementation, a group of bars for each case, ours in colour.

    Returns:
        The files written, `<kernel>.png`.

    Raises:
        ModuleNotFoundError: matplotlib (the `report` extra) is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    written = []
    for operation in dict.fromkeys(m.operation for m in found):
        shown = [m for m in found if m.operation == operation]
        with rc_context(STYLE):
            figure = Figure(figsize=(8, 1.0 + BAR_INCHES * len(shown)), layout="constrained")
            axes = figure.subplots()
            colours = [ACCENT if m.implementation == OURS else MUTED for m in shown]
            bars = axes.barh(range(len(shown)), [m.median_ms for m in shown], color=colours)
            axes.set_yticks(range(len(shown)), [f"{m.case}: {m.implementation}" for m in shown])
            axes.bar_label(bars, [_label(m) for m in shown])
            axes.margins(x=0.25)
            axes.invert_yaxis()
            axes.grid(axis="y", visible=False)
            axes.set_xlabel(f"median ms (× of {shown[0].baseline})")
            axes.set_title(operation)
            path = folder / f"{operation}.png"
            figure.savefig(path, dpi=120)
        written.append(path)
    return written


def _label(m: Measurement) -> str:
    ratio = "" if m.ratio is None else f", {m.ratio:.2f}×"
    return f" {m.median_ms:.3g} ms{ratio}"
