"""The interpreter and the traffic counter themselves: a kernel whose answer is known by hand."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from lit_align_kernels.audit.bfloat16 import narrow, widen
from lit_align_kernels.audit.interpreter import interpreted, is_interpreted
from lit_align_kernels.audit.traffic import traffic


@triton.jit
def scale_kernel(x_ptr, out_ptr, n, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    tl.store(out_ptr + at, x * factor.to(x.dtype), mask=at < n)


@triton.jit
def stray_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at))


@triton.jit
def racing_kernel(out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.program_id(0) + at)


@triton.jit
def racing_lanes_kernel(out_ptr, SHARED: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(out_ptr + lane // SHARED, lane)


@triton.jit
def overlapping_kernel(out_ptr, at):
    """Program 0 stores 4 bytes, program 1 the 2 bytes number `at`."""
    if tl.program_id(0) == 0:
        tl.store(out_ptr, 1)
    else:
        tl.store(out_ptr.to(tl.pointer_type(tl.int16)) + at, 7)


@triton.jit
def shifted_kernel(x_ptr, out_ptr, x_shift, out_shift, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(out_ptr + out_shift + lane, tl.load(x_ptr + x_shift + lane))


@triton.jit
def padded_rows_kernel(x_ptr, out_ptr, stride, LOADED: tl.constexpr, STORED: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, LOADED)
    x = tl.load(x_ptr + row * stride + at)
    tl.store(out_ptr + row * stride + at, x, mask=at < STORED)


@triton.jit
def gather_kernel(x_ptr, index_ptr, out_ptr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(out_ptr + lane, tl.load(x_ptr + tl.load(index_ptr + lane)))


@triton.jit
def through_table_kernel(table_ptr, out_ptr, BLOCK: tl.constexpr):
    x_ptr = tl.load(table_ptr).to(tl.pointer_type(tl.float32))
    lane = tl.arange(0, BLOCK)
    tl.store(out_ptr + lane, tl.load(x_ptr + lane))


@triton.jit
def sum_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)), 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_round_as_torch_does(dtype):
    x, out = torch.randn(1000).to(dtype), torch.full((1000,), torch.nan, dtype=dtype)
    with interpreted():
        scale_kernel[(4,)](x, out, 1000, 1.7, BLOCK=256)
    assert torch.equal(out, x * torch.tensor(1.7, dtype=dtype))


def test_bf16_is_rounded_to_the_nearest_even():
    values = torch.cat([torch.randn(1000), torch.tensor([1.0 + 2**-8, 1.0 + 3 * 2**-8, -0.0])])
    values = torch.cat([values, torch.tensor([float("inf"), 3.4e38])])
    expected = values.bfloat16()
    bits = narrow(values.numpy())
    assert (bits == expected.view(torch.uint16).numpy()).all()
    assert (widen(bits) == expected.float().numpy()).all()
    assert torch.isnan(torch.from_numpy(widen(narrow(torch.tensor([torch.nan]).numpy())))).all()


def test_reductions_of_bf16():
    x, out = torch.ones(64, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16)
    with interpreted():
        sum_kernel[(1,)](x, out, BLOCK=64)
    assert out.item() == 64


def test_the_language_is_whole_again_afterwards():
    before = tl.load, triton.knobs.runtime.interpret, tl.tensor.__add__
    with interpreted():
        assert is_interpreted()
        assert tl.load is not before[0]
    assert not is_interpreted()
    assert (tl.load, triton.knobs.runtime.interpret, tl.tensor.__add__) == before


def test_bytes_are_counted_by_tensor():
    x, out = torch.randn(1000, dtype=torch.float64).bfloat16(), torch.empty(1000).bfloat16()
    with interpreted(), traffic() as seen:
        scale_kernel[(4,)](x, out, 1000, 2.0, BLOCK=256)
    assert seen.moved == seen.unique == 4000
    by_tensor = seen.by_tensor()
    assert (by_tensor["x_ptr"].loaded, by_tensor["out_ptr"].stored) == (2000, 2000)
    assert (seen.races, seen.out_of_bounds, seen.launches[0].programs) == (0, 0, 4)


def test_a_gather_costs_a_sector_for_every_entry():
    x, out = torch.randn(64 * 8), torch.empty(64)
    index = torch.arange(64) * 8  # 32 bytes apart
    with interpreted(), traffic() as seen:
        gather_kernel[(1,)](x, index, out, BLOCK=64)
    counts = seen.by_tensor()["x_ptr"]
    first_in_sector = x.data_ptr() % 32 == 0
    assert (counts.loaded, counts.sectors) == (256, 64 * 32 if first_in_sector else counts.sectors)
    assert counts.sectors >= 64 * 32


@pytest.mark.parametrize("short", ["x", "out"])
def test_a_stray_access_is_an_error(short):
    x, out = torch.randn(120 if short == "x" else 128), torch.empty(120 if short == "out" else 128)
    with pytest.raises(InterpreterError, match="8 of 64 lanes"), interpreted(), traffic():
        stray_kernel[(2,)](x, out, BLOCK=64)


def test_two_programs_that_write_one_place_race():
    out = torch.zeros(64, dtype=torch.int32)
    with interpreted(), traffic() as seen:
        racing_kernel[(2,)](out, BLOCK=64)
    assert seen.races == 64


@pytest.mark.parametrize(("shared", "races"), [(1, 0), (2, 32), (64, 63)])
def test_lanes_of_one_store_race(shared, races):
    with interpreted(), traffic() as seen:
        racing_lanes_kernel[(1,)](torch.zeros(64, dtype=torch.int32), SHARED=shared, BLOCK=64)
    assert seen.races == races


@pytest.mark.parametrize(("at", "races"), [(0, 1), (1, 1), (2, 0)])
def test_stores_of_two_widths_race_where_their_bytes_meet(at, races):
    with interpreted(), traffic() as seen:
        overlapping_kernel[(2,)](torch.zeros(4, dtype=torch.int32), at)
    assert seen.races == races


@pytest.mark.parametrize("shift", [-8, -1, 1])
def test_a_store_outside_a_view_is_stray_though_its_storage_goes_on(shift):
    x, room = torch.randn(16), torch.zeros(64)
    with pytest.raises(InterpreterError, match="of a store in"), interpreted(), traffic():
        shifted_kernel[(1,)](x, room[24:40], 0, shift, BLOCK=16)


def test_a_load_may_begin_within_the_same_16_bytes():
    room, out = torch.zeros(64, dtype=torch.bfloat16), torch.zeros(16, dtype=torch.bfloat16)
    view = room[11:32]  # 22 bytes behind a multiple of 64
    with interpreted(), traffic() as seen:
        shifted_kernel[(1,)](view, out, -3, 0, BLOCK=16)
    assert seen.out_of_bounds == 0
    for stray in (-4, 6):
        with pytest.raises(InterpreterError, match="1 of 16 lanes"), interpreted(), traffic():
            shifted_kernel[(1,)](view, out, stray, 0, BLOCK=16)


def test_what_pads_the_last_row_may_be_read_and_not_written():
    room = torch.zeros(5, 32)
    x, out = room[:3, :21], torch.zeros(5, 32)[:3, :21]
    with interpreted(), traffic() as seen:
        padded_rows_kernel[(3,)](x, out, 32, LOADED=32, STORED=21)
    assert seen.races == seen.out_of_bounds == 0
    with pytest.raises(InterpreterError, match="1 of 22 lanes"), interpreted(), traffic():
        padded_rows_kernel[(3,)](x, out, 32, LOADED=32, STORED=22)
    with pytest.raises(InterpreterError, match="32 of 32 lanes"), interpreted(), traffic():
        padded_rows_kernel[(4,)](x, out, 32, LOADED=32, STORED=21)


def test_tensors_behind_a_table_of_pointers_are_named():
    x, out = torch.randn(16), torch.empty(16)
    table = torch.tensor([x.data_ptr()])
    with interpreted(), traffic({"x": x}) as seen:
        through_table_kernel[(1,)](table, out, BLOCK=16)
    assert torch.equal(out, x)
    assert seen.by_tensor()["x"].loaded == 64
    with pytest.raises(InterpreterError, match="outside every tensor"), interpreted(), traffic():
        through_table_kernel[(1,)](table, out, BLOCK=16)
