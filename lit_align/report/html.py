"""The report of a run: one HTML file that needs no network and no other file."""

import base64
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2

from lit_align.files import write_atomically
from lit_align.report import drawing
from lit_align.report.figures import Curves, HeatMap, Histogram
from lit_align.report.tables import Table, format_cell

LIBRARIES = (
    "lit-align",
    "torch",
    "lightning",
    "transformers",
    "peft",
    "bitsandbytes",
    "triton",
    "datasets",
    "safetensors",
)
HALF_INCHES = 6.6  # pictures up to this wide stand two in a row
NO_PICTURES = (
    "Pictures are left out because matplotlib is not installed: "
    'pip install "lit-align[report]", then make the report again.'
)


@dataclass(frozen=True)
class _Picture:
    title: str
    caption: str
    source: str | None  # a data: URL; None without matplotlib
    wide: bool


def library_versions() -> dict[str, str]:
    """The versions that a result depends on; an absent optional library is left out."""
    installed = {d.name.lower(): d.version for d in metadata.distributions() if d.name}
    found = {name: installed[name] for name in LIBRARIES if name in installed}
    return {"python": platform.python_version(), "machine": platform.platform(), **found}


def write_report(
    path: str | Path,
    *,
    title: str,
    tables: Sequence[Table] = (),
    figures: Sequence[HeatMap | Histogram] = (),
    curves: Sequence[Curves] = (),
    config: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
    fingerprints: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write one self-contained HTML file.

    The text of every argument is escaped. Without matplotlib the report has its tables and says
    how to get the pictures.

    Args:
        path: Where the file shall stand; written whole or not at all.
        title: The heading.
        tables: The first is the result and stands on top; one of more than 30 rows is folded.
        figures: Heat maps and histograms.
        curves: Lines over training steps.
        config: Every setting of the run, as JSON can hold it.
        versions: By library; those of this process by default.
        fingerprints: SHA-256 of model, data and mask, by what they identify.
        notes: Sentences under the result: what it does and does not show.

    Returns:
        The path of the report.
    """
    path = Path(path)
    page = _template().render(
        title=title,
        tables=tables,
        pictures=_draw_all([*curves, *figures]),
        no_pictures=NO_PICTURES,
        config=json.dumps(config, indent=2, ensure_ascii=False, default=str) if config else "",
        versions=library_versions() if versions is None else versions,
        fingerprints=fingerprints or {},
        notes=notes,
        written_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    # Sampled text may hold lone surrogates, which no encoding takes: show them as escapes.
    write_atomically(path, page.encode("utf-8", errors="backslashreplace"))
    return path


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lit_align.report", package_path=""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = format_cell
    return environment.get_template("template.html")


def _draw_all(figures: Sequence[Curves | HeatMap | Histogram]) -> list[_Picture]:
    return [
        _Picture(
            figure.title,
            figure.caption,
            _data_url(figure),
            drawing.size_inches(figure)[0] > HALF_INCHES,
        )
        for figure in figures
    ]


def _data_url(figure: Curves | HeatMap | Histogram) -> str | None:
    """The picture inside an `img` address: ids of several SVGs in one page cannot collide."""
    try:
        svg = drawing.draw(figure)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        return None
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
