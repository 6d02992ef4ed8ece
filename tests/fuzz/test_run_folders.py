"""Run folders that somebody else prepared, to be resumed by whoever trusts them."""

import json

import pytest

from lit_align.data.bad_rows import BadRow
from lit_align.data.streaming_loader import RejectedRows
from lit_align.errors import PipelineError
from lit_align.pipelines.rows import PAIR, read_json, read_jsonl
from lit_align.pipelines.stage import Stage, run_stages


def write(folder, text="x"):
    (folder / "model").mkdir()
    (folder / "model" / "f").write_text(text)


@pytest.fixture
def run(tmp_path):
    """Runs two stages in `tmp_path / "run"`, once to begin with; says which of them ran."""

    def again(text="x"):
        lines = []
        stages = [
            Stage("one", {"text": text}, [], lambda folder: write(folder, text)),
            Stage("two", {}, ["one"], lambda folder: (folder / "g").write_text("y")),
        ]
        run_stages(stages, tmp_path / "run", log=lines.append)
        return [line for line in lines if "running" in line]

    again()
    return again


@pytest.mark.parametrize("name", ["model/adapter_config.json", "model/chat_template.jinja", "x"])
def test_files_beside_those_of_a_stage_are_not_taken_along(run, tmp_path, name):
    path = tmp_path / "run" / "one" / name
    path.write_text("{}")
    with pytest.raises(PipelineError, match=r"was not written by stage 'one'"):
        run()
    path.unlink()
    (path.parent / ".DS_Store").write_text("")
    assert run() == []


def test_links_lead_nowhere(run, tmp_path):
    (secret := tmp_path / "secret").mkdir()
    (secret / "f").write_text("x")
    folder = tmp_path / "run" / "one" / "model"
    (folder / "f").unlink()
    (folder / "f").symlink_to(secret / "f")
    with pytest.raises(PipelineError, match="was not written by stage 'one'"):
        run()
    (folder / "f").unlink()
    folder.rmdir()
    folder.symlink_to(secret)
    with pytest.raises(PipelineError, match="was not written by stage 'one'"):
        run()
    folder.unlink()
    assert len(run()) == 1


@pytest.mark.parametrize(
    "name", [".stage-one.partial", ".stage-one.old", ".manifest.json.1.partial"]
)
def test_leftovers_that_are_links_are_removed_and_what_they_mean_is_not(run, tmp_path, name):
    (treasure := tmp_path / "treasure").mkdir()
    (treasure / "f").write_text("mine")
    (tmp_path / "run" / name).symlink_to(treasure)
    assert run() == []
    assert len(run("other")) == 2
    assert (treasure / "f").read_text() == "mine" and len(list(treasure.iterdir())) == 1
    assert not (tmp_path / "run" / name).is_symlink()


def test_results_that_are_links_are_replaced_and_not_written_through(tmp_path):
    from lit_align.pipelines.rows import write_json
    from lit_align.report import write_report

    (victim := tmp_path / "victim").write_text("mine")
    for name in ("results.json", "report.html"):
        (tmp_path / name).symlink_to(victim)
    write_json(tmp_path / "results.json", {})
    write_report(tmp_path / "report.html", title="x", tables=[])
    assert victim.read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "row 1 is of the type list"),
        ('{"id": "a"}', "row 1 lacks 'prompt'"),
        ('{"id": 5, "prompt": "", "chosen": "", "rejected": ""}', r"row 1\['id'\] is of the type"),
        ("{", "Expecting"),
        ("[" * 10**5, "recursion"),
        ("\ud800", "codec"),
    ],
)
def test_rows_that_no_stage_writes(tmp_path, text, message):
    path = tmp_path / "pairs" / "pairs.jsonl"
    path.parent.mkdir()
    path.write_text(text, "utf-8", "surrogatepass")
    with pytest.raises(PipelineError, match=rf"pairs\.jsonl is not what.*{message}.*pairs to have"):
        read_jsonl(path, PAIR)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"rows": [{"n": True}], "named": {}}, r"it\['rows'\]\[0\]\['n'\] is of the type bool"),
        ({"rows": [{}], "named": {}}, r"it\['rows'\]\[0\] lacks 'n'"),
        ({"rows": {}, "named": {}}, r"it\['rows'\] is of the type dict"),
        ({"rows": [], "named": {"a": [1, "x"]}}, r"it\['named'\]\['a'\]\[1\] is of the type str"),
        ([], "it is of the type list"),
    ],
)
def test_documents_of_another_form(tmp_path, value, place):
    (tmp_path / "x.json").write_text(json.dumps(value))
    form = {"rows": [{"n": int}], "named": {str: [(int, float)]}}
    with pytest.raises(PipelineError, match=place):
        read_json(tmp_path / "x.json", form)


def test_rejected_rows_of_a_stream_are_not_written_through_a_link(tmp_path):
    (victim := tmp_path / "victim").write_text("mine")
    (tmp_path / "rejected.jsonl").symlink_to(victim)
    RejectedRows(tmp_path / "rejected.jsonl", keep=True).add([BadRow("f", 1, "r", "m", {})])
    assert victim.read_text() == "mine"
    assert len((tmp_path / "rejected.jsonl").read_text().splitlines()) == 1
