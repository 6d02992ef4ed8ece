"""Rows that cannot be used: why, where, and what to do with them."""

from __future__ import annotations

import collections
import dataclasses
import json
from pathlib import Path
from typing import Any

from lit_align.errors import DataError
from lit_align.files import write_atomically

SHOWN_ROWS = 10
REJECTED_FILE = "rejected_rows.jsonl"


class BadRowError(DataError):
    """One row that cannot be used; `reason` is what rows are counted by, `detail` is this row's."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that was turned down.

    Attributes:
        file: the file, folder or hub id as the user named it.
        line: counted from 1.
        reason: what such rows are counted by.
        message: the reason with this row's details.
        row: the row's values, or the line's text where it could not be parsed.
    """

    file: str
    line: int
    reason: str
    message: str
    row: Any


class BadRows:
    """Collects bad rows over all files of a split, so that one message can name them together."""

    def __init__(self) -> None:
        self.rows: list[BadRow] = []

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, file: str, line: int, error: BadRowError, row: Any) -> None:
        """Note one bad row."""
        self.rows.append(BadRow(file, line, error.reason, str(error), row))

    def report(self) -> str:
        """Each reason with its count, then file, line and reason of the first ten rows."""
        counts = collections.Counter(bad.reason for bad in self.rows)
        lines = [f"{len(self.rows)} bad row(s):"]
        lines += [f"  {count} x {reason}" for reason, count in counts.most_common()]
        lines += [f"first {min(SHOWN_ROWS, len(self.rows))}:"]
        lines += [f"  {bad.file}:{bad.line}: {bad.message}" for bad in self.rows[:SHOWN_ROWS]]
        return "\n".join(lines)

    def raise_if_any(self, *, can_skip: bool = True) -> None:
        """Raise a `DataError` with the report, unless every row was fine.

        Args:
            can_skip: there is an option `on_bad_row` to go on without them.
        """
        if self.rows:
            skip = ", or go on without them by on_bad_row: skip" if can_skip else ""
            raise DataError(f"{self.report()}\nCorrect the rows{skip}.")

    def write(self, folder: str | Path) -> Path:
        """Write the bad rows to `<folder>/rejected_rows.jsonl`, whole or not at all.

        Text that is not valid Unicode is written as JSON escapes, so the file is always ASCII, and
        what JSON does not have (a date in a data set of the hub) as text.
        """
        path = Path(folder) / REJECTED_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(as_line(bad) + "\n" for bad in self.rows).encode("ascii"))
        return path


def as_line(bad: BadRow) -> str:
    """A bad row as one line of `rejected_rows.jsonl`."""
    return json.dumps(dataclasses.asdict(bad), default=str)
