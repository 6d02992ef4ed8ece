"""The plot of `lit-align bench training`: speed and memory of every method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lit_align.report.drawing import ACCENT, MUTED, STYLE

PLOT_FILE = "training.png"
BAR_INCHES = 0.34


class TrainingBar(NamedTuple):
    """What is drawn of a method."""

    label: str
    pairs_per_s: float
    peak_mib: float
    is_ours: bool


def draw_training(found: Sequence[TrainingBar], folder: Path) -> Path:
    """Pairs a second and peak memory side by side, a bar for every method, ours in colour.

    Returns:
        The file written.

    Raises:
        ModuleNotFoundError: matplotlib (the `report` extra) is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(11, 1.2 + BAR_INCHES * len(found)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        colours = [ACCENT if bar.is_ours else MUTED for bar in found]
        for axes, values, label in (
            (left, [bar.pairs_per_s for bar in found], "pairs a second (more is better)"),
            (right, [bar.peak_mib for bar in found], "peak memory, MiB (less is better)"),
        ):
            bars = axes.barh(range(len(found)), values, color=colours)
            axes.bar_label(
                bars, [f" {value:.3g}" if value < 100 else f" {value:,.0f}" for value in values]
            )
            axes.margins(x=0.15)
            axes.grid(axis="y", visible=False)
            axes.set_xlabel(label)
        left.set_yticks(range(len(found)), [bar.label for bar in found])
        left.invert_yaxis()
        figure.suptitle("DPO on the same pairs")
        path = folder / PLOT_FILE
        figure.savefig(path, dpi=120)
    return path
