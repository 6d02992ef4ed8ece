import json

import datasets
import pytest

from lit_align.data.bad_rows import BadRows
from lit_align.data.files import read_rows
from lit_align.errors import DataError

ROWS = [{"prompt": "a\u2028b\x85", "n": 1}, {"prompt": "é", "n": 2}]


def read(source):
    bad_rows = BadRows()
    return list(read_rows(source, bad_rows)), bad_rows


def test_jsonl_is_split_on_line_feeds_alone(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    path.write_bytes(b"\xef\xbb\xbf" + f"{lines[0]}\r\n\n{lines[1]}".encode())
    rows, bad_rows = read(path)
    assert rows == [(1, ROWS[0]), (3, ROWS[1])] and not len(bad_rows)


def test_bad_lines_are_noted_and_passed_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    digits = b"1" * 5000
    path.write_bytes(b'{"a": 1\n\xff{}\n[1]\n{"a": ' + digits + b'}\n{"a": 2}\n' + b"[" * 100_000)
    rows, bad_rows = read(path)
    assert rows == [(5, {"a": 2})]
    assert [(bad.line, bad.reason) for bad in bad_rows.rows] == [
        (1, "not JSON"), (2, "not UTF-8"), (3, "not a JSON object"), (4, "not JSON"),
        (6, "not JSON"),
    ]  # fmt: skip
    assert bad_rows.rows[1].row == "\\xff{}\n"


def test_json_is_one_list(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([*ROWS, 3]))
    rows, bad_rows = read(path)
    assert rows == [(1, ROWS[0]), (2, ROWS[1])]
    assert [bad.line for bad in bad_rows.rows] == [3]
    path.write_text("{}")
    with pytest.raises(DataError, match="expected a list of rows, found dict"):
        read(path)
    path.write_text("[")
    with pytest.raises(DataError, match="not JSON"):
        read(path)


def test_datasets_folders(tmp_path):
    folder = tmp_path / "saved"
    messages = {"messages": [{"role": "user", "content": "x"}]}
    datasets.Dataset.from_list([messages]).save_to_disk(folder)
    assert read(folder)[0] == [(1, messages)]
    splits = tmp_path / "splits"
    parts = {
        "train": datasets.Dataset.from_list(ROWS),
        "test": datasets.Dataset.from_list(ROWS[:1]),
    }
    datasets.DatasetDict(parts).save_to_disk(splits)
    assert len(read(splits)[0]) == 2
    assert read(f"{splits}:test")[0] == [(1, ROWS[0])]
    with pytest.raises(DataError, match="no split 'dev'; there are train, test"):
        read(f"{splits}:dev")
    with pytest.raises(DataError, match="not a folder written by save_to_disk"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["absent.jsonl", "folder/absent.jsonl", "/absent/folder", "x"])
def test_nothing_there_makes_no_network_call(name, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(DataError, match="no such file or folder"):
        read(name)


def test_hub_ids_take_a_split(monkeypatch):
    calls = []

    def load_dataset(name, split):
        calls.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("owner/name")[0] == [(1, ROWS[0]), (2, ROWS[1])]
    read("owner/name:test[:10]")
    assert calls == [("owner/name", "train"), ("owner/name", "test[:10]")]


def test_other_kinds_of_file(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("a,b\n")
    with pytest.raises(DataError, match=r"must end in .jsonl, .json, .parquet, .csv"):
        read(path)
