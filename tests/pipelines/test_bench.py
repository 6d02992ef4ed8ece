import dataclasses
import json
import sys

import pytest
import torch

from lit_align.cli import main
from lit_align_kernels import benchmarks
from lit_align_kernels.audit import table
from lit_align_kernels.benchmarks import swap_selected
from lit_align_kernels.benchmarks.case import CheckFailedError


def test_bench_writes_figures_and_plots(tmp_path, capsys):
    main(["bench", "swap_selected", "masked_adamw", "--size", "tiny", "--output", str(tmp_path)])
    record = json.loads((tmp_path / "bench.json").read_text())
    assert [m["operation"] for m in record["measurements"]] == ["swap_selected"] * 4 + [
        "masked_adamw"
    ] * 4
    assert record["ceilings"]["copy_gb_per_s"] > 0
    for name in ("swap_selected", "masked_adamw"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "token_logprobs.png").exists()
    printed = capsys.readouterr().out
    assert "masked_adamw: 10 % of rows" in printed and "TFLOP/s" in printed.splitlines()[0]


def test_all_kernels_run_where_none_is_named(tmp_path):
    main(["bench", "--size", "tiny", "--output", str(tmp_path)])
    record = json.loads((tmp_path / "bench.json").read_text())
    assert {m["operation"] for m in record["measurements"]} == set(benchmarks.OPERATIONS)


def test_an_unknown_kernel_ends_with_the_known_ones(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "adamw", "--output", str(tmp_path)])
    assert stop.value.code == 1
    assert "no kernel 'adamw': choose from masked_adamw" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["--size", "tiny", "swap_selected"],
        ["swap_selected", "--size=tiny", "swap_selected"],
        ["swap_selected", "swap_selected", "--size", "tiny"],
    ],
)
def test_kernels_stand_anywhere_and_run_once(words, tmp_path):
    main(["bench", "--output", str(tmp_path), *words])
    record = json.loads((tmp_path / "bench.json").read_text())
    assert [m["operation"] for m in record["measurements"]] == ["swap_selected"] * 4


def refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *words])
    assert stop.value.code == 1
    return capsys.readouterr().err


@pytest.fixture
def nothing_is_timed(monkeypatch):
    def never(*args):
        raise AssertionError("something was timed")

    monkeypatch.setattr(benchmarks, "measure_ceilings", never)


def test_a_wrong_kernel_is_refused(tmp_path, capsys, monkeypatch):
    def fails(self):
        raise CheckFailedError(f"{self.operation} is wrong")

    monkeypatch.setattr(benchmarks.BenchmarkCase, "check", fails)
    words = ["swap_selected", "--size", "tiny", "--output", str(tmp_path)]
    assert "swap_selected is wrong" in refused(words, capsys)
    assert not (tmp_path / "bench.json").exists()


def test_what_was_measured_before_a_wrong_kernel_is_kept(tmp_path, capsys, monkeypatch):
    check = benchmarks.BenchmarkCase.check

    def fails_late(self):
        if self.operation == "masked_weight_grad":
            raise CheckFailedError("wrong")
        return check(self)

    monkeypatch.setattr(benchmarks.BenchmarkCase, "check", fails_late)
    words = ["swap_selected", "masked_weight_grad", "--size", "tiny", "--output", str(tmp_path)]
    assert "wrong" in refused(words, capsys)
    record = json.loads((tmp_path / "bench.json").read_text())
    assert [m["operation"] for m in record["measurements"]] == ["swap_selected"] * 4
    assert (tmp_path / "swap_selected.png").exists()


def test_a_competitor_that_is_left_out_is_named(tmp_path, capsys, monkeypatch):
    def raises(swaps):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(swap_selected, "_torch", raises)
    case = swap_selected.cases("tiny", torch.device("cpu"))[0]
    right = dataclasses.replace(case, expected=case.implementations["lit-align"])
    monkeypatch.setattr(benchmarks, "cases", lambda *_: [right])
    main(["bench", "swap_selected", "--size", "tiny", "--output", str(tmp_path)])
    assert "torch is left out: RuntimeError: no compiler" in capsys.readouterr().out
    record = json.loads((tmp_path / "bench.json").read_text())
    assert [one["implementation"] for one in record["left_out"]] == ["torch"]
    assert [m["ratio"] for m in record["measurements"]] == [None]


@pytest.mark.parametrize("choice", ["triton", "foo"])
def test_a_choice_that_cannot_run_is_no_traceback(
    choice, tmp_path, capsys, monkeypatch, nothing_is_timed
):
    monkeypatch.setenv("LIT_ALIGN_KERNELS", choice)
    said = refused(["--output", str(tmp_path)], capsys)
    assert said.startswith("lit-align: LIT_ALIGN_KERNELS=") and choice in said


def test_matplotlib_is_missed_before_anything_is_timed(
    tmp_path, capsys, monkeypatch, nothing_is_timed
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    assert 'pip install "lit-align[report]"' in refused(["--output", str(tmp_path)], capsys)


def test_an_output_that_is_a_file_is_refused_first(tmp_path, capsys, nothing_is_timed):
    (tmp_path / "a").write_text("kept")
    assert "a is a file" in refused(["--output", str(tmp_path / "a")], capsys)
    assert str(tmp_path / "a") in refused(["--output", str(tmp_path / "a" / "b")], capsys)
    assert (tmp_path / "a").read_text() == "kept"


@pytest.fixture
def audited(monkeypatch):
    """The kernels that were audited."""
    names = []

    def audit(name, progress):
        names.append(name)
        return [table.OperationAudit(name, "", [], [])]

    monkeypatch.setattr(table, "audit", audit)
    return names


def test_the_audit_writes_its_document(tmp_path, audited, capsys):
    main(["bench", "swap_selected", "--audit", "--document", str(tmp_path / "docs" / "K.md")])
    assert "## swap_selected" in (tmp_path / "docs" / "K.md").read_text()
    assert "K.md" in capsys.readouterr().out


def test_the_audit_of_some_kernels_leaves_the_document_alone(
    tmp_path, audited, capsys, monkeypatch
):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "KERNELS.md").write_text("all of them")
    monkeypatch.chdir(tmp_path)
    main(["bench", "--audit", "swap_selected"])
    assert "## swap_selected" in capsys.readouterr().out
    assert (tmp_path / "docs" / "KERNELS.md").read_text() == "all of them"
    main(["bench", "--audit"])
    written = (tmp_path / "docs" / "KERNELS.md").read_text()
    assert all(f"## {name}\n" in written for name in benchmarks.OPERATIONS)


def test_the_audit_needs_a_place_for_its_document(tmp_path, audited, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--document" in refused(["--audit"], capsys)
    assert "is a folder" in refused(["--audit", "--document", str(tmp_path)], capsys)
    assert not audited and not list(tmp_path.iterdir())


def test_help_shows_kernels_and_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("--audit", "--document", *benchmarks.OPERATIONS))
