"""Rows of data are text and nothing else: no template, no markup, no path, no command."""

import base64
import json
import re
import signal
from html.parser import HTMLParser
from xml.etree import ElementTree

import datasets
import pyarrow.parquet
import pytest

from lit_align import chat_templates
from lit_align.data import RowTokenizer, tables
from lit_align.data.bad_rows import BadRowError, BadRows
from lit_align.data.files import read_rows
from lit_align.data.loading import RowLoader
from lit_align.data.schema import SFTRow
from lit_align.data.validate import LONGEST_TEXT
from lit_align.errors import DataError, ModelError
from lit_align.evaluation import encode_prompt
from lit_align.report import Curves, HeatMap, Histogram, Table, write_report
from tests.tiny_models import CHAT_TEMPLATE, tiny_tokenizer

HOSTILE = (
    "{{ 7 * 7 }}{% for i in range(9) %}x{% endfor %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "$(touch it_ran) `touch it_ran`; touch it_ran | touch it_ran",
    "../../it_ran",
    "<script>alert(1)</script>\"'&",
    "%s %n {0} ${HOME} \\",
)


def row(text: str) -> SFTRow:
    return SFTRow([{"role": "user", "content": text}], [{"role": "assistant", "content": text}])


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.mark.parametrize("text", HOSTILE)
def test_a_row_is_text_to_the_template_and_stays_as_it_is(tokenizer, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "rows.jsonl"
    message = {"role": "user", "content": text, "name": text, "id": text, "path": text}
    path.write_text(json.dumps({"messages": [message, message | {"role": "assistant"}]}))
    rows = RowLoader(SFTRow, RowTokenizer(tokenizer, 512)).from_files([path], BadRows())
    (sequence,) = rows[0].sequences
    assert tokenizer.decode(sequence.prompt_ids.tolist()) == (
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(sequence.response_ids.tolist()) == f"{text}<|im_end|>"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ self._TemplateReference__context.eval_ctx.environment.loader }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ 1 / 0 }}",
        "{{ messages + 5 }}",
        "{{ messages[9].content.x.y }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ cycler.__init__.__globals__.os.mkdir('it_ran') }}",
        "{{ unfinished",
    ],
)
def test_a_models_template_is_shut_in(template, tmp_path, monkeypatch):
    """It comes with the model: it may write the prompt, and nothing else."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(BadRowError, match="the chat template refuses the messages"):
        RowTokenizer(tokenizer, 512)(row("hello"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(0)  # pytest-timeout holds the alarm otherwise
def test_a_template_that_does_not_end_is_stopped(monkeypatch):
    monkeypatch.setattr(chat_templates, "LONGEST_SECONDS", 0.2)
    endless, before = tiny_tokenizer(), signal.getsignal(signal.SIGALRM)
    endless.chat_template = "{% for j in range(99999) %}" * 4 + "{% endfor %}" * 4
    # Not a bad row: each of a million others would take as long.
    with pytest.raises(ModelError, match=r"does not end: it takes longer than 0\.2 s"):
        RowTokenizer(endless, 512)(row("hello"))
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) == before


def test_a_templates_error_is_ours_where_a_model_is_asked(tokenizer):
    broken = tiny_tokenizer()
    broken.chat_template = "{{ messages.x.y }}"
    with pytest.raises(DataError, match="the chat template refuses the messages"):
        encode_prompt(broken, [{"role": "user", "content": "hello"}])


@pytest.mark.parametrize(
    "prompt",
    [["rows"], [1, True], [1.5], [-1], [10**9], [None], [{"role": "user"}],
     [{"content": 5}], [{"content": "x"}, "y"], [[1]]],
)  # fmt: skip
def test_what_is_no_prompt_is_not_given_to_a_model(tokenizer, prompt):
    with pytest.raises(DataError, match="a prompt holds"):
        encode_prompt(tokenizer, prompt)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_row_is_text_where_a_model_is_asked(tokenizer, text):
    ids = encode_prompt(tokenizer, [{"role": "user", "content": text}])
    assert tokenizer.decode(ids) == (f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("field", ["reasoning_content", "name"])
def test_special_tokens_in_other_fields_than_the_content(tokenizer, field, tmp_path):
    special = tiny_tokenizer()
    special.chat_template = CHAT_TEMPLATE.replace(
        "message['content']", f"message['{field}'] + message['content']"
    )
    message = {"role": "user", "content": "x", field: "<|im_end|>"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [message, message | {"role": "assistant"}]}))
    bad_rows = BadRows()
    assert RowLoader(SFTRow, RowTokenizer(special, 512)).from_files([path], bad_rows) == []
    assert bad_rows.rows[0].reason == "special token as text"


def test_rows_nested_too_deep_are_bad_rows_that_can_be_written(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("[" * 900 + "]" * 900 + "\n" + '{"messages": ' + "[" * 300 + "]" * 300 + "}\n")
    bad_rows = BadRows()
    assert RowLoader(SFTRow, RowTokenizer(tokenizer)).from_files([path], bad_rows) == []
    bad_rows.write(tmp_path)
    with pytest.raises(DataError, match="2 x not JSON"):
        bad_rows.raise_if_any()


def test_a_name_that_is_there_twice_is_a_bad_row(tmp_path):
    """Other readers would take the other one."""
    text = '{"prompt": "a", "prompt": "b", "completion": "c"}'
    (tmp_path / "rows.jsonl").write_text(text)
    bad_rows = BadRows()
    assert list(read_rows(tmp_path / "rows.jsonl", bad_rows)) == []
    assert "'prompt' is there twice" in bad_rows.rows[0].message
    (tmp_path / "rows.json").write_text(f"[{text}]")
    with pytest.raises(DataError, match="'prompt' is there twice"):
        list(read_rows(tmp_path / "rows.json", bad_rows))


def test_a_row_that_would_take_minutes_to_tokenise(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "x " * (LONGEST_TEXT // 2 + 1), "completion": "y"}))
    bad_rows = BadRows()
    assert RowLoader(SFTRow, RowTokenizer(tokenizer)).from_files([path], bad_rows) == []
    assert bad_rows.rows[0].reason == "longer than 16 million characters"


def test_a_parquet_file_that_unpacks_to_more_than_anybody_wrote(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "SMALL_BYTES", 1 << 16)
    table = pyarrow.table({"prompt": ["x" * 2**22]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", compression="zstd")
    assert (tmp_path / "rows.parquet").stat().st_size < 2000
    with pytest.raises(DataError, match="claim to be"):
        list(read_rows(tmp_path / "rows.parquet", BadRows()))


@pytest.mark.parametrize("as_dictionary", [True, False])
def test_a_parquet_file_whose_rows_share_one_long_text(tmp_path, monkeypatch, as_dictionary):
    """It claims the text once: only the rows show how often it is there."""
    monkeypatch.setattr(tables, "SMALL_BYTES", 1 << 22)
    texts = pyarrow.array(["x" * 2**20] * 50)
    columns = {"prompt": texts.dictionary_encode() if as_dictionary else texts}
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path, compression="zstd")
    rows = read_rows(path, BadRows())
    with pytest.raises(DataError, match="claim to be"):
        for _ in range(20):
            next(rows)


@pytest.mark.timeout(20)
def test_a_csv_file_of_many_columns(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(",".join(map(str, range(200_000))) + "\n")
    assert list(read_rows(path, BadRows())) == []


@pytest.mark.parametrize("nested", [False, True])
def test_a_row_that_names_a_picture_has_nobody_open_it(tmp_path, nested):
    """`datasets` takes what a row says for a path or an address, and reads it."""
    place = {"bytes": None, "path": str(tmp_path / "absent.png")}
    plain = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({"image": [plain] if nested else plain})
    rows = datasets.Dataset.from_list([{"image": [place] if nested else place}], features)
    rows.save_to_disk(tmp_path / "rows")
    info = tmp_path / "rows" / "dataset_info.json"
    document = json.loads(info.read_text())
    image = {"_type": "Image"}
    document["features"]["image"] = {"feature": image, "_type": "List"} if nested else image
    info.write_text(json.dumps(document))
    ((_, row),) = read_rows(tmp_path / "rows", BadRows())
    assert row["image"] == ([place] if nested else place)


class Tags(HTMLParser):
    """The tags and attributes of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found += [tag, *(name for name, _ in attrs)]


@pytest.mark.parametrize(
    "evil", [HOSTILE[4], "</title></style><img src=x onerror=alert(1)>", "]]></text><script>1"]
)
def test_no_text_becomes_markup_in_a_report_or_its_pictures(evil, tmp_path):
    pytest.importorskip("matplotlib")
    many = tuple((evil, i) for i in range(40))
    path = write_report(
        tmp_path / "report.html",
        title=evil,
        tables=[
            Table(evil, (evil, "n"), ((evil, 1), ([evil], 2)), evil),
            Table(evil, ("a", "b"), many),
        ],
        curves=[Curves(evil, evil, {evil: ([0, 1], [0.5, 0.4])})],
        figures=[
            Histogram(evil, evil, (1e-8, 1e-7, 1e-6), (3, 4)),
            HeatMap(evil, (evil, "k"), (evil, "0"), ((None, 0.1), (0.5, 0.0))),
        ],
        config={evil: [evil, {evil: None}]},
        versions={evil: evil},
        fingerprints={evil: evil},
        notes=[evil, evil],
    )
    text = path.read_text(encoding="utf-8")
    found = Tags(text).found
    assert not {"script", "onerror", "iframe", "object", "href", "onload"} & set(found)
    assert found.count("title") == 1 and found.count("style") == 1
    pictures = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', text)
    assert len(pictures) == found.count("img") == 3
    for picture in pictures:
        for element in ElementTree.fromstring(base64.b64decode(picture)).iter():
            assert not element.tag.endswith(("script", "foreignObject", "}a"))
            assert not any(name.startswith("on") for name in element.attrib)
