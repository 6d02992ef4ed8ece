"""Results for people: tables in the terminal, and one self-contained HTML report."""

from lit_align.report.figures import (
    Curves,
    HeatMap,
    Histogram,
    density_heat_map,
    read_metrics_csv,
    score_histogram,
)
from lit_align.report.html import library_versions, write_report
from lit_align.report.tables import Table, format_interval, format_table

__all__ = [
    "Curves",
    "HeatMap",
    "Histogram",
    "Table",
    "density_heat_map",
    "format_interval",
    "format_table",
    "library_versions",
    "read_metrics_csv",
    "score_histogram",
    "write_report",
]
