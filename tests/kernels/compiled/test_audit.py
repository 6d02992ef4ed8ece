"""The compile audit itself: kernels of which it is known what they become."""

import importlib

import pytest
import triton
import triton.language as tl

from lit_align_kernels.audit.compiled import TARGETS, CompileCase, compile_audit


@triton.jit
def helper(x_ptr, at):
    return tl.load(x_ptr + at)  # stream


@triton.jit
def scatter_kernel(x_ptr, index_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = helper(x_ptr, at)
    index = tl.load(index_ptr + at)  # table
    tl.store(out_ptr + index, x)  # scattered
    tl.store(x_ptr + at, x * 2)  # the last one (a comment, but no tag)
    tl.debug_barrier()  # stream


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    a = tl.load(a_ptr + at)  # stream
    b = tl.load(b_ptr + at)  # stream
    tl.store(c_ptr + at, tl.dot(a, b))  # stream


@triton.jit
def atomic_kernel(x_ptr):
    tl.atomic_add(x_ptr, 1.0)


def scatter_case(hint):
    signature = {"x_ptr": f"*fp32{hint}", "index_ptr": "*i32", "out_ptr": "*fp32"}
    return CompileCase("scatter", scatter_kernel, signature, {"BLOCK": 1024})


@pytest.mark.parametrize("target", TARGETS)
def test_accesses_are_led_back_to_their_lines(target):
    report = compile_audit(scatter_case(""), target)
    assert report.wide_share() == 1
    assert set(report.accesses["scattered"]) == {4}
    assert set(report.accesses["table"]) == {16}
    assert report.accesses["untagged"].keys() == {16}  # the last store has no tag
    threads = 4 * (64 if target.startswith("gfx") else 32)
    assert report.all_accesses == {4: 1024 // threads, 16: 3 * (256 // threads)}
    assert report.registers > 0 and report.spills == 0 and report.fits


IN_TWO_FILES = {
    "rows_of_helper": """
import triton
import triton.language as tl

@triton.jit
def load(x_ptr, index_ptr, at):
    index = tl.load(index_ptr + at)  # table
    return tl.load(x_ptr + index)  # scattered
""",
    "rows_of_kernel": """
import triton
import triton.language as tl
from rows_of_helper import load
@triton.jit
def kernel(x_ptr, index_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, load(x_ptr, index_ptr, at))  # stream
""",
}


def test_lines_of_one_number_in_two_files_are_told_apart(tmp_path, monkeypatch):
    """The load of one and the store of the other are line 8, side by side."""
    for name, source in IN_TWO_FILES.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    kernel = importlib.import_module("rows_of_kernel").kernel
    signature = {"x_ptr": "*fp32", "index_ptr": "*i32", "out_ptr": "*fp32"}
    report = compile_audit(CompileCase("two files", kernel, signature, {"BLOCK": 1024}), "sm_90")
    assert report.accesses == {"scattered": {4: 8}, "stream": {16: 2}, "table": {16: 2}}


def test_an_unaligned_pointer_has_no_wide_accesses():
    assert compile_audit(scatter_case(":1"), "sm_90").wide_share() == 0


@pytest.mark.parametrize(
    ("target", "instruction"),
    [("sm_80", "mma"), ("sm_90", "wgmma"), ("sm_100", "tcgen05"), ("gfx942", "mfma")],
)
def test_matrix_instructions_are_counted(target, instruction):
    signature = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32"}
    report = compile_audit(CompileCase("dot", product_kernel, signature, {"BLOCK": 64}), target)
    assert report.matrix_instructions.keys() == {instruction}


def test_spills_are_seen():
    signature = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32"}
    case = CompileCase("a sum of 256", product_kernel, signature, {"BLOCK": 128}, num_warps=2)
    assert compile_audit(case, "sm_80").spills > 0


def test_atomics_are_seen():
    assert compile_audit(
        CompileCase("atomic", atomic_kernel, {"x_ptr": "*fp32"}, {}), "sm_90"
    ).atomics


def test_an_argument_that_is_missing_is_an_error():
    case = CompileCase("scatter", scatter_kernel, {"x_ptr": "*fp32"}, {"BLOCK": 1024})
    with pytest.raises(ValueError, match="scatter_kernel: 'index_ptr'"):
        compile_audit(case, "sm_90")
