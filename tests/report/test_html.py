import base64
import re
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from lit_align.report import (
    Curves,
    HeatMap,
    Histogram,
    Table,
    drawing,
    library_versions,
    write_report,
)

CURVES = Curves("Loss", "loss", {"warm-up": ([0, 1, 2], [0.69, 0.6, 0.5])})
HISTOGRAM = Histogram("Change", "score", (1e-8, 1e-7, 1e-6), (3, 4), threshold=1e-7)
HEAT_MAP = HeatMap("Mask", ("q", "k"), ("none", "0"), ((None, 0.1), (0.5, 0.0)), top=0.2)
TABLE = Table("Accuracy", ("model", "n"), (("base", 1000), ("ALLO", None)), note="Wide intervals.")


class Page(HTMLParser):
    """What a reader of the page sees, and every address in it."""

    def __init__(self, text: str):
        super().__init__()
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href")]

    def handle_data(self, data):
        self.words.append(data)


def page(tmp_path, **arguments) -> Page:
    arguments = {"title": "Run", "tables": [TABLE], **arguments}
    return Page(write_report(tmp_path / "report.html", **arguments).read_text(encoding="utf-8"))


def test_one_file_without_a_network_address(tmp_path):
    pytest.importorskip("matplotlib")
    made = page(tmp_path, curves=[CURVES], figures=[HISTOGRAM, HEAT_MAP])
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert len(made.addresses) == 3
    for address in made.addresses:
        kind, data = address.split(",", 1)
        assert kind == "data:image/svg+xml;base64"
        assert ElementTree.fromstring(base64.b64decode(data)).tag.endswith("svg")
    assert not {"script", "link", "iframe"} & set(made.tags)


def test_holds_everything_it_was_given(tmp_path):
    said = " ".join(
        page(
            tmp_path,
            title="ALLO on tiny",
            notes=["Eight in a hundred."],
            config={"beta": 0.1, "stage": {"lr": 1e-6}},
            versions={"torch": "2.13.0"},
            fingerprints={"base model": "ab" * 32},
        ).words
    )
    for text in ["ALLO on tiny", "Eight in a hundred.", '"lr": 1e-06', "2.13.0", "ab" * 32]:
        assert text in said
    for text in ["Accuracy", "base", "1,000", "–", "Wide intervals."]:
        assert text in said


def test_text_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>\"'&"
    made = page(
        tmp_path,
        title=evil,
        tables=[Table(evil, (evil,), ((evil,),), evil)],
        figures=[HISTOGRAM],
        config={evil: evil},
        fingerprints={evil: evil},
        versions={evil: evil},
        notes=[evil],
    )
    assert "script" not in made.tags
    assert " ".join(made.words).count("alert(1)") >= 10


def test_text_that_no_encoding_takes(tmp_path):
    made = page(tmp_path, notes=["cut \ud83d here"])
    assert r"cut \ud83d here" in " ".join(made.words)


def test_without_matplotlib_the_tables_stay_and_the_report_says_how(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # its import fails
    made = page(tmp_path, curves=[CURVES], figures=[HEAT_MAP])
    said = " ".join(made.words)
    assert 'pip install "lit-align[report]"' in said
    assert "Mask" in said
    assert "1,000" in said
    assert made.addresses == []


def test_a_long_table_is_folded(tmp_path):
    rows = tuple((str(i), i) for i in range(31))
    assert "details" in page(tmp_path, tables=[Table("T", ("a", "b"), rows)], versions={}).tags
    assert "details" not in page(tmp_path, versions={}).tags


def test_the_same_numbers_draw_the_same_bytes():
    pytest.importorskip("matplotlib")
    for figure in (CURVES, HISTOGRAM, HEAT_MAP):
        first = drawing.draw(figure)
        assert first == drawing.draw(figure)
        assert not re.search(
            r"https?://(?!www\.w3\.org|purl\.org|creativecommons|matplotlib)", first
        )


def test_library_versions_name_what_a_result_depends_on():
    assert {"python", "torch", "transformers"} <= library_versions().keys()
