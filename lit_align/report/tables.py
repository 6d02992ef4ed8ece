"""Tables of results: one type, printed in the terminal here and as HTML by the report."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ABSENT = "–"
MAX_TEXT_WIDTH = 48
NOTE_WIDTH = 100


@dataclass(frozen=True)
class Table:
    """A titled table.

    Attributes:
        title: What the table shows.
        columns: Their headings, units included.
        rows: One cell a column: text, number, bool, or None where there is nothing to say.
        note: A sentence below the table: what the numbers may and may not be read as.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.title!r}: {len(row)} cells for {len(self.columns)} columns: {row}"
                )

    @classmethod
    def from_records(
        cls, title: str, records: Sequence[Mapping[str, Any]], note: str = ""
    ) -> "Table":
        """A row for each record; columns in the order in which their keys first appear."""
        columns = tuple(dict.fromkeys(key for record in records for key in record))
        rows = tuple(tuple(record.get(key) for key in columns) for record in records)
        return cls(title, columns, rows, note)

    def is_numeric(self, column: int) -> bool:
        """Whether a column holds numbers alone (and so is set flush right)."""
        cells = [row[column] for row in self.rows if row[column] is not None]
        return bool(cells) and all(
            isinstance(cell, int | float) and not isinstance(cell, bool) for cell in cells
        )


def format_cell(cell: object) -> str:
    """The text of one cell: integers grouped by thousands, other numbers to four digits.

    >>> format_cell(134515008), format_cell(0.123456), format_cell(None), format_cell(True)
    ('134,515,008', '0.1235', '–', 'yes')
    >>> format_cell(3.2e-07), format_cell(1234.56), format_cell((3, 4))
    ('3.2e-07', '1,234.6', '3 x 4')
    """
    if cell is None:
        return ABSENT
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        return _format_float(cell)
    if isinstance(cell, tuple | list):
        return " x ".join(str(part) for part in cell)
    return str(cell)


def _format_float(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def format_interval(estimate: float, low: float, high: float) -> str:
    """A share and its interval, all in [0, 1], as percentages.

    >>> format_interval(0.08, 0.041, 0.15)
    '8.0 % [4.1, 15.0]'
    """
    return f"{100 * estimate:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def format_table(table: Table) -> str:
    """The table as lines for a terminal, numbers flush right, long texts cut.

    >>> print(format_table(Table("Runs", ("name", "steps"), (("base", 0), ("dpo", 1200)))))
    Runs
    name  steps
    ----  -----
    base      0
    dpo   1,200
    """
    body = [[_one_line(cell) for cell in row] for row in table.rows]
    columns = [_one_line(column) for column in table.columns]
    widths = [max(map(len, cells)) for cells in zip(columns, *body, strict=True)]
    numeric = [table.is_numeric(index) for index in range(len(table.columns))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        )
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    lines = [printable(table.title), line(columns), rule, *map(line, body)]
    return "\n".join([*lines, *textwrap.wrap(printable(table.note), NOTE_WIDTH)])


def _one_line(cell: object) -> str:
    text = printable(format_cell(cell))
    return text if len(text) <= MAX_TEXT_WIDTH else text[: MAX_TEXT_WIDTH - 3] + "..."


def printable(text: str) -> str:
    """The text on one line: what a terminal would act on becomes a space."""
    return "".join(c if c.isprintable() else " " for c in text)
