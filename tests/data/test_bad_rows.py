import json

import pytest

from lit_align.data.bad_rows import BadRowError, BadRows
from lit_align.errors import DataError


def test_the_report_counts_reasons_and_names_the_first_ten():
    bad_rows = BadRows()
    bad_rows.raise_if_any()
    for line in range(1, 13):
        reason = "no response" if line % 3 else "lone surrogate"
        bad_rows.add("x.jsonl", line, BadRowError(reason, f"detail {line}"), {})
    with pytest.raises(DataError) as caught:
        bad_rows.raise_if_any()
    lines = str(caught.value).splitlines()
    assert lines[:5] == [
        "12 bad row(s):",
        "  8 x no response",
        "  4 x lone surrogate",
        "first 10:",
        "  x.jsonl:1: no response (detail 1)",
    ]
    assert lines[13] == "  x.jsonl:10: no response (detail 10)"
    assert "on_bad_row: skip" in lines[14]


def test_rows_are_written_whatever_they_hold(tmp_path):
    bad_rows = BadRows()
    bad_rows.add("x.jsonl", 4, BadRowError("lone surrogate"), {"prompt": "\ud800 é"})
    path = bad_rows.write(tmp_path / "new")
    (line,) = path.read_text("ascii").splitlines()
    assert path.name == "rejected_rows.jsonl"
    assert json.loads(line) == {
        "file": "x.jsonl",
        "line": 4,
        "reason": "lone surrogate",
        "message": "lone surrogate",
        "row": {"prompt": "\ud800 é"},
    }
    assert [p.name for p in path.parent.iterdir()] == ["rejected_rows.jsonl"]
