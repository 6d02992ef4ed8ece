"""Rows of tables: Parquet (typed and nested columns) and CSV (cells are text)."""

from __future__ import annotations

import csv
import datetime
import decimal
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from lit_align.data.bad_rows import BadRowError, BadRows
from lit_align.data.schema import texts_in
from lit_align.errors import DataError

NumberedRows = Iterator[tuple[int, dict[str, Any]]]

BATCH_ROWS = 16  # read at a time: conversations are long
MOST_PACKED = 1000  # times a Parquet file's size
SMALL_BYTES = 1 << 26
LONGEST_CELL = 2**31 - 1  # Python's own limit, 128 KiB, is less than a long conversation
# What these columns hold is never plain text, so a cell of a CSV file is JSON.
JSON_COLUMNS = frozenset(
    {
        "messages", "turns", "choices", "answer_index", "token_weights", "chosen_token_weights",
        "rejected_token_weights", "reward", "prompt_ids", "chosen_ids", "rejected_ids",
        "response_ids", "retain", "is_correct", "predictions", "errors",
    }
)  # fmt: skip
# JSON text of messages, or what Python prints for them, which is no JSON.
MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](?:role|content)["']\s*:""")
UNDECODABLE = re.compile(r"[\udc80-\udcff]")  # what `surrogateescape` makes of a byte
BOOLEANS = ("True", "False", "TRUE", "FALSE")  # as other programs write them


def read_parquet(path: Path, bad_rows: BadRows) -> NumberedRows:
    """Yield (number counted from 1, values) of each row of a Parquet file, a batch in memory.

    Dates, decimals and bytes become text, so that every row can be written as JSON.

    Raises:
        DataError: the file is no Parquet file, is damaged, or claims to unpack to more than 1000
            times its size.
    """
    number = unpacked = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            claimed = file.metadata  # its columns' are not asked: pyarrow aborts at damaged ones
            groups = (claimed.row_group(i).total_byte_size for i in range(claimed.num_row_groups))
            _check_size(path, max(sum(groups), claimed.num_rows))
            for batch in file.iter_batches(BATCH_ROWS):
                for row in batch_rows(batch):
                    number += 1
                    if isinstance(row, BadRowError):
                        bad_rows.add(str(path), number, row, None)
                        continue
                    # A text that the file has once may be that of every row.
                    unpacked += sum(map(len, texts_in(row)))
                    _check_size(path, unpacked)
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged after row {number}, or no Parquet: {error}") from error


def _check_size(path: Path, unpacked: int) -> None:
    """Raise DataError for a file that is made to fill the memory: text packs 100 times at best."""
    packed = path.stat().st_size
    if unpacked > SMALL_BYTES + MOST_PACKED * packed:
        raise DataError(
            f"{path}: {packed} bytes that claim to be {unpacked} bytes of rows: not read; write it "
            "anew if that is true"
        )


def batch_rows(batch: pyarrow.RecordBatch) -> Iterator[dict[str, Any] | BadRowError]:
    """The rows of a batch; an error in place of one that holds text that is not UTF-8."""
    foreign = [field.name for field in batch.schema if not _is_json(field.type)]
    try:
        rows: Iterable[Any] = batch.to_pylist()
    except UnicodeDecodeError:
        rows = (_row_alone(batch, i) for i in range(batch.num_rows))
    for row in rows:
        if not isinstance(row, BadRowError):
            row.update({name: json_value(row[name]) for name in foreign})
        yield row


def _row_alone(batch: pyarrow.RecordBatch, index: int) -> dict[str, Any] | BadRowError:
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return BadRowError("not UTF-8", f"byte {error.start}")


def _is_json(kind: pyarrow.DataType) -> bool:
    """Whether values of an Arrow type are values of JSON as they are."""
    types = pyarrow.types
    if types.is_struct(kind):
        return all(_is_json(field.type) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_json(kind.value_type)
    tests: Iterable[Callable[[pyarrow.DataType], bool]] = (
        types.is_string, types.is_large_string, types.is_integer, types.is_floating,
        types.is_boolean, types.is_null,
    )  # fmt: skip
    return any(test(kind) for test in tests)


def json_value(value: Any) -> Any:
    """A value as JSON can hold it: dates and times in ISO's form, decimals and bytes as text."""
    if isinstance(value, dict):
        return {str(name): json_value(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(each) for each in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return str(value) if isinstance(value, decimal.Decimal | datetime.timedelta) else value


def read_csv(path: Path, bad_rows: BadRows) -> NumberedRows:
    """Yield (line that the row begins on, values) of each row of a CSV file.

    RFC 4180 with a header: commas, double quotes, line breaks inside quotes. Cells are text; those
    of `JSON_COLUMNS`, and messages in any column, are parsed as JSON. An empty cell of a JSON
    column stands for none. Columns without a name (pandas' index) are left out.

    Raises:
        DataError: no header, one that cannot be read, or one that names a column twice.
    """
    with path.open("rb") as lines:
        records = _records(path, lines, bad_rows)
        header = _header(path, records, bad_rows)
        for number, cells in records:
            try:
                yield number, _row(header, cells)
            except BadRowError as error:
                bad_rows.add(str(path), number, error, _readable(cells))


def _records(
    path: Path, lines: Iterable[bytes], bad_rows: BadRows
) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of each record; malformed ones go to `bad_rows`."""
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(_decoded(lines), strict=True)
    while True:
        begins = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            bad_rows.add(str(path), begins, BadRowError("not CSV", str(error)), None)
            continue
        if cells is None:
            return
        if cells:
            yield begins, cells


def _decoded(lines: Iterable[bytes]) -> Iterator[str]:
    """Lines as text; undecodable bytes become surrogates: only rows that have some are lost."""
    for number, line in enumerate(lines):
        text = line.decode("utf-8", "surrogateescape")
        yield text.removeprefix("\ufeff") if number == 0 else text


def _header(path: Path, records: Iterator[tuple[int, list[str]]], bad_rows: BadRows) -> list[str]:
    known = len(bad_rows)
    _, header = next(records, (0, []))
    if len(bad_rows) > known:  # else the first row would be taken for it
        raise DataError(f"{path}: its header is {bad_rows.rows[known].message}")
    if UNDECODABLE.search("".join(header)):
        raise DataError(f"{path}: its header is not UTF-8: save the file as UTF-8")
    header = [name.strip() for name in header]
    named = [name for name in header if name]
    if not named:
        raise DataError(f"{path}: a CSV file begins with the names of its columns")
    name, times = Counter(named).most_common(1)[0]
    if times > 1:
        raise DataError(f"{path}: two columns are called {name!r}")
    return header


def _row(header: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(header):
        raise BadRowError("not as many cells as columns", f"{len(cells)} cells, {len(header)}")
    return {name: _cell(name, text) for name, text in zip(header, cells, strict=True) if name}


def _cell(name: str, text: str) -> Any:
    """A cell's value: its text, or what it says as JSON."""
    if UNDECODABLE.search(text):
        raise BadRowError("not UTF-8", f"column {name}")
    if name not in JSON_COLUMNS and not MESSAGES.match(text):
        return text
    if not text.strip():
        return None
    try:
        return json.loads(text.lower() if text in BOOLEANS else text)
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"not JSON in column {name}", str(error)) from error


def _readable(cells: list[str]) -> list[str]:
    """Cells with undecodable bytes written as escapes."""
    return [cell.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            for cell in cells]  # fmt: skip
