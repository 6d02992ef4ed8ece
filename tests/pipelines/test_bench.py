import json

import pytest

from lit_align.cli import main
from lit_align_kernels import benchmarks
from lit_align_kernels.audit import table
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


def test_a_wrong_kernel_is_refused(tmp_path, capsys, monkeypatch):
    def fails(self):
        raise CheckFailedError(f"{self.operation} is wrong")

    monkeypatch.setattr(benchmarks.BenchmarkCase, "check", fails)
    with pytest.raises(SystemExit) as stop:
        main(["bench", "swap_selected", "--size", "tiny", "--output", str(tmp_path)])
    assert stop.value.code == 1
    assert "swap_selected is wrong" in capsys.readouterr().err
    assert not (tmp_path / "bench.json").exists()


def test_the_audit_writes_its_document(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        table, "audit", lambda name, progress: [table.OperationAudit(name, "", [], [])]
    )
    main(["bench", "swap_selected", "--audit", "--document", str(tmp_path / "docs" / "K.md")])
    assert "## swap_selected" in (tmp_path / "docs" / "K.md").read_text()
    assert "K.md" in capsys.readouterr().out
