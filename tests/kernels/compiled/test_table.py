"""The tables of docs/KERNELS.md, and Liger's kernels beside ours."""

import dataclasses

import pytest

from lit_align_kernels.audit import liger, table
from lit_align_kernels.audit.compiled import CompileReport, compile_audit


@pytest.fixture
def one():
    compiled = CompileReport(
        name="a case", kernel="k", target="sm_90", registers=40, spills=8, shared_bytes=2048,
        accesses={"stream": {16: 9, 4: 1}, "scattered": {2: 8}, "table": {4: 1, 8: 2}},
        matrix_instructions={"wgmma": 4}, atomics=0,
    )  # fmt: skip
    counted = table.TrafficReport("a run", 2048, 4096, 2048, 8192, 0, 1)
    return table.OperationAudit("an operation", "What it is.", [compiled], [counted])


def test_markdown_holds_every_figure(one):
    text = table.markdown([one])
    compiled = "| 40 | 8 | 2.0 | 9/21 | 9/10 | 8 × 2 | 1 × 4, 2 × 8 | wgmma × 4 |"
    assert f"| a case | sm_90 {compiled}" in text
    assert "| a run | 2.0 | 2.000 | 1.000 | 2.00 | – | 0 | 1 |" in text
    assert "## an operation\n\nWhat it is.\n" in text


def test_what_is_missing_is_a_dash(one):
    bare = dataclasses.replace(one.compiled[0], accesses={}, matrix_instructions={})
    text = table.markdown([dataclasses.replace(one, compiled=[bare])])
    assert "| a case | sm_90 | 40 | 8 | 2.0 | – | – | – | – | – |" in text


def test_without_tags_only_all_accesses_count(one):
    untagged = dataclasses.replace(one.compiled[0], accesses={"untagged": {16: 16, 4: 4}})
    text = table.markdown([dataclasses.replace(one, compiled=[untagged])])
    assert "| a case | sm_90 | 40 | 8 | 2.0 | 16/20 | – | – | – | wgmma × 4 |" in text


def test_what_torch_moves_is_shown(one):
    packed = dataclasses.replace(one.counted[0], extra_bytes=1024)
    text = table.markdown([dataclasses.replace(one, counted=[packed])])
    assert "| a run | 2.0 | 2.000 | 1.000 | 2.00 | 0.500 | 0 | 1 |" in text


def test_rows_are_as_long_as_their_heads(one):
    lines = [line for line in table.markdown([one]).splitlines() if line.startswith("|")]
    assert [line.count("|") for line in lines] == 3 * [11] + 3 * [9]


def test_an_unknown_kernel_is_an_error():
    with pytest.raises(ValueError, match="no kernel 'adamw'"):
        table.audit("adamw")


@pytest.mark.skipif(not liger.is_installed(), reason="liger-kernel is not installed")
def test_ligers_kernel_loses_its_wide_accesses_where_v_is_odd():
    reports = {c.name: compile_audit(c, "sm_90") for c in liger.compile_cases("sm_90")}
    assert reports["bf16, V = 49,152"].wide_share("untagged") > 0.5
    assert reports["bf16, V = 50,257"].wide_share("untagged") == 0
