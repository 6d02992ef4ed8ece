import doctest

import pytest

from lit_align.report import tables
from lit_align.report.tables import Table, format_table


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(tables).failed == 0


def test_columns_line_up_and_numbers_are_flush_right():
    table = Table("T", ("model", "n"), (("base", 5), ("a longer name", 12345)), note="A note.")
    assert format_table(table).splitlines() == [
        "T",
        "model               n",
        "-------------  ------",
        "base                5",
        "a longer name  12,345",
        "A note.",
    ]


def test_records_may_lack_a_key():
    table = Table.from_records("T", [{"a": 1}, {"a": 2, "b": None, "c": "x"}])
    assert table.columns == ("a", "b", "c")
    assert table.rows == ((1, None, None), (2, None, "x"))
    assert table.is_numeric(0)
    assert not table.is_numeric(1)


def test_a_cell_stays_on_one_line_of_the_terminal():
    line = format_table(Table("T", ("text",), (("a\nb\x1b[31m" + "c" * 90,),))).splitlines()[3]
    assert line.startswith("a b [31mccc")
    assert line.endswith("...")
    assert len(line) == tables.MAX_TEXT_WIDTH


def test_a_row_of_the_wrong_length_is_an_error():
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        Table("T", ("a", "b"), ((1,),))


def test_a_table_without_rows_prints_its_head():
    assert format_table(Table("T", ("a", "bc"), ())).splitlines() == ["T", "a  bc", "-  --"]
