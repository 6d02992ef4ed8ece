"""Parquet and CSV: the same rows as JSONL gives, and every unusable one named by file and row."""

import csv
import datetime
import decimal
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_align.data import PreferenceDataModule, SFTDataModule
from lit_align.data.bad_rows import BadRows
from lit_align.data.files import read_rows
from lit_align.data.tokenize import RowTokenizer
from lit_align.errors import DataError
from lit_align.pipelines.rows import RowReader
from tests.tiny_models import tiny_tokenizer

TALK = [{"role": "user", "content": 'Hi, "you"\n'}, {"role": "assistant", "content": "Hé"}]
PAIRS = [{"prompt": f"{i}, then", "chosen": ' "yes"\nno', "rejected": " no"} for i in range(5)]


def read(path):
    bad_rows = BadRows()
    return list(read_rows(path, bad_rows)), bad_rows


def write_csv(path: Path, rows: list[dict]) -> Path:
    """As `csv` writes it; lists as JSON."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow(json.dumps(v) if isinstance(v, list) else v for v in row.values())
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


WRITERS = {".csv": write_csv, ".parquet": write_parquet, ".jsonl": write_jsonl}


# ---- Parquet -------------------------------------------------------------------------------


def test_nested_columns_come_as_lists_and_dicts(tmp_path):
    rows = [{"messages": TALK, "token_weights": [0.5, 1.0], "n": 1}] * 600
    assert read(write_parquet(tmp_path / "a.parquet", rows))[0] == list(enumerate(rows, 1))


def test_columns_that_json_lacks_become_text(tmp_path):
    row = {
        "day": datetime.date(2024, 2, 29),
        "price": decimal.Decimal("1.50"),
        "raw": b"a\xff",
        "nested": [{"at": datetime.datetime(2024, 1, 2, 3, 4)}],
        "none": None,
    }
    [(_, found)], _ = read(write_parquet(tmp_path / "a.parquet", [row]))
    assert json.loads(json.dumps(found)) == {
        "day": "2024-02-29", "price": "1.50", "raw": "a\\xff",
        "nested": [{"at": "2024-01-02T03:04:00"}], "none": None,
    }  # fmt: skip


def test_a_parquet_row_that_is_not_utf8_is_noted_alone(tmp_path):
    good = pa.array([b"a", b"\xff", b"c"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, good.buffers())
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": text}), path)
    rows, bad_rows = read(path)
    assert rows == [(1, {"prompt": "a"}), (3, {"prompt": "c"})]
    assert [(b.file, b.line, b.reason) for b in bad_rows.rows] == [(str(path), 2, "not UTF-8")]


def test_a_damaged_parquet_file_is_named_with_the_row(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_text("not parquet")
    with pytest.raises(DataError, match=r"a\.parquet: damaged after row 0, or no Parquet"):
        read(path)
    write_parquet(path, [{"text": f"{i}" * 400} for i in range(3000)])
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = bytes(4000)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: damaged after row \d{2,}"):
        read(path)


# ---- CSV -----------------------------------------------------------------------------------


def test_cells_with_commas_quotes_and_line_breaks(tmp_path):
    path = write_csv(tmp_path / "a.csv", PAIRS)
    rows, bad_rows = read(path)
    assert [row for _, row in rows] == PAIRS and not len(bad_rows)
    assert [line for line, _ in rows] == [2, 4, 6, 8, 10]  # a record's first line


def test_messages_and_lists_are_parsed_and_other_text_is_not(tmp_path):
    row = {"messages": TALK, "token_weights": [0.0, 1.0], "retain": True, "output": '[{"a": 1}]'}
    row |= {"prompt": [TALK[0]], "answer_index": 2, "choices": ["x", "y"], "note": "True"}
    [(_, found)], _ = read(write_csv(tmp_path / "a.csv", [row]))
    assert found == row


def test_an_empty_cell_is_empty_text_or_none(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,messages\n,\n", "utf-8")
    assert read(path)[0] == [(2, {"prompt": "", "messages": None})]


def test_a_byte_order_mark_crlf_an_index_column_and_long_cells(tmp_path):
    path = tmp_path / "a.csv"
    long = "x" * 200_000
    path.write_bytes(b'\xef\xbb\xbf,"prompt",n\r\n0,' + long.encode() + b",1\r\n\r\n1,b,2")
    rows, _ = read(path)
    assert rows == [(2, {"prompt": long, "n": "1"}), (4, {"prompt": "b", "n": "2"})]


def test_bad_csv_rows_are_named_by_line_and_the_others_are_read(tmp_path):
    path = tmp_path / "a.csv"
    lines = [
        b"prompt,messages", b"a,", b"b", b"\xff,", b'"c"d,', b'e,"[{""role"": ""user""}"',
        b"\"[{'role': 'user', 'content': 'x'}]\",", b"f,g,h", b'z,"unclosed', b"to the end",
    ]  # fmt: skip
    path.write_bytes(b"\n".join(lines))
    rows, bad_rows = read(path)
    assert rows == [(2, {"prompt": "a", "messages": None})]
    assert [(bad.line, bad.reason) for bad in bad_rows.rows] == [
        (3, "not as many cells as columns"), (4, "not UTF-8"), (5, "not CSV"),
        (6, "not JSON in column messages"), (7, "not JSON in column prompt"),
        (8, "not as many cells as columns"), (9, "not CSV"),
    ]  # fmt: skip
    bad_rows.write(tmp_path)
    assert f"{path}:3: not as many cells as columns (1 cells, 2)" in bad_rows.report()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "begins with the names"),
        (b"\n\n", "begins with the names"),
        (b"a,b,a\n", "called 'a'"),
        (b'a,"b"c\n1,2\n', "its header is not CSV"),
        (b"a,b\r1,2\r", "its header is not CSV .new-line"),
        ("a,b\n1,2\n".encode("utf-16"), "its header is not UTF-8"),
    ],
)
def test_headers_that_cannot_be(text, message, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(text)
    with pytest.raises(DataError, match=rf"a\.csv: .*{message}"):
        read(path)


# ---- wherever a data file is accepted --------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_data_modules_make_the_same_batches_of_every_kind_of_file(suffix, tmp_path):
    talks = [{"messages": [TALK[0], {"role": "assistant", "content": f"{i}"}]} for i in range(5)]
    for kind, rows in ((PreferenceDataModule, PAIRS), (SFTDataModule, talks)):
        found = []
        for name in (suffix, ".jsonl"):
            file = WRITERS[name](tmp_path / f"rows{name}", rows)
            module = kind(tiny_tokenizer(), str(file), batch_size=2)
            module.setup("fit")
            found.append([batch.input_ids.tolist() for batch in module.train_dataloader()])
        assert found[0] == found[1]


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_bad_row_is_named_by_file_and_row(suffix, tmp_path):
    rows = [PAIRS[0], PAIRS[1] | {"chosen": "", "rejected": "b"}, PAIRS[2]]
    file = WRITERS[suffix](tmp_path / f"rows{suffix}", rows)
    line = {".csv": 4, ".parquet": 2, ".jsonl": 2}[suffix]
    with pytest.raises(DataError, match=rf"rows\{suffix}:{line}: no response"):
        PreferenceDataModule(tiny_tokenizer(), str(file)).setup("fit")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_pipelines_read_questions_of_every_kind_of_file(suffix, tmp_path):
    rows = [{"question": "Which?", "choices": ["red", "a hen"], "answer_index": i} for i in (0, 1)]
    found = []
    for name in (suffix, ".jsonl"):
        reader = RowReader("questions", RowTokenizer(tiny_tokenizer(), 512))
        read_in = reader.read(str(WRITERS[name](tmp_path / f"rows{name}", rows)))
        assert not reader.bad_rows
        found.append([{k: v for k, v in row.items() if k != "id"} for row in read_in])
    assert found[0] == found[1] and len(found[0]) == 2
