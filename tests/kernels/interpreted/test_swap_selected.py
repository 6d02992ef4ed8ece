"""The Triton kernel in the interpreter: values, memory it may touch, bytes it moves."""

import math

import pytest
import torch

from lit_align_kernels import launch_tables
from lit_align_kernels.audit.interpreter import interpreted
from lit_align_kernels.audit.traffic import traffic
from lit_align_kernels.entries import Entries
from lit_align_kernels.swap_selected import (
    audit,
    gather_selected_,
    kernel,
    reference,
    scatter_selected_,
    swap_selected_,
)
from tests.kernels.cases import KINDS, KINDS_3D, elements, entries_of, flat_order

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [(kind, shape) for kind in KINDS for shape in ((252, 123), (5, 1100))]
CASES += [(kind, (3, 5, 7)) for kind in KINDS_3D] + [("rows", (9, 1040)), ("rows", (40, 64))]


def amid_nans(n, dtype, offset=16):
    """Random values in the middle of a tensor of NaNs."""
    room = torch.full((n + offset + 9,), torch.nan, dtype=dtype)
    room[offset : offset + n] = torch.randn(n)
    return room[offset : offset + n]


def bits(tensor):
    """Everything in the tensor's storage, as integers."""
    room = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return room.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16).clone()


def example(kind, shape, dtype, offset=16, seed=0):
    torch.manual_seed(seed)
    entries = entries_of(kind, shape, seed)
    weight = amid_nans(math.prod(shape), dtype).view(shape)
    return weight, entries, amid_nans(entries.numel, dtype, offset)


def launch(swaps, *operation):
    with interpreted():
        kernel.launch(swaps, *operation)


def check_swap(weight, entries, values):
    at, flat = flat_order(entries), weight.view(-1)
    before, selected, given = (bits(weight), bits(values)), flat[at].clone(), values.clone()
    launch([(weight, entries, values)])
    assert torch.equal(values, selected)
    assert torch.equal(flat[at], given)
    flat[at], values[:] = selected, given  # all else is bitwise as it was
    assert torch.equal(bits(weight), before[0]) and torch.equal(bits(values), before[1])
    for _ in range(2):
        launch([(weight, entries, values)])
    assert torch.equal(bits(weight), before[0]) and torch.equal(bits(values), before[1])


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_twice_is_nothing(kind, shape):
    check_swap(*example(kind, shape, torch.bfloat16))


@pytest.mark.parametrize("most", [0, 2**40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_elements_by_list_and_by_bitmap(monkeypatch, dtype, most):
    monkeypatch.setattr(launch_tables, "MOST_POSITIONS_PER_ENTRY", most)
    monkeypatch.setattr(launch_tables, "MOST_WORDS_PER_ENTRY_OF_A_BLOCK", most)
    for kind in KINDS:
        if kind.startswith("elements"):
            check_swap(*example(kind, (41, 123), dtype))


@pytest.mark.parametrize("kind", ["rows", "elements", "all", "columns"])
def test_values_may_start_anywhere(kind):
    check_swap(*example(kind, (52, 123), torch.bfloat16, offset=3))


@pytest.mark.parametrize("block", [16, 64, 256])
def test_bitmaps_with_long_gaps_at_every_block_size(monkeypatch, block):
    monkeypatch.setattr(launch_tables, "block_entries", lambda: block)
    monkeypatch.setattr(launch_tables, "MOST_POSITIONS_PER_ENTRY", 2**40)
    monkeypatch.setattr(launch_tables, "MOST_WORDS_PER_ENTRY_OF_A_BLOCK", 2**40)
    monkeypatch.setattr(kernel, "TILE", 32)
    ends = [0, 31, 32, 33, *range(6000, 6200), *range(11_000, 12_000, 7), 19_990, 19_999]
    weight = amid_nans(20_000, torch.float32).view(100, 200)
    entries = elements((100, 200), torch.tensor(ends))
    check_swap(weight, entries, amid_nans(len(ends), torch.float32))


def test_nans_and_negative_zeros_keep_their_bits():
    weight, entries, values = example("elements, every", (9, 31), torch.bfloat16)
    weight.view(torch.int16).random_(-(2**15), 2**15)
    values.view(torch.int16).random_(-(2**15), 2**15)
    before = bits(weight), bits(values)
    launch([(weight, entries, values)])
    inside = slice(16, 16 + 9 * 31)
    assert torch.equal(bits(weight)[inside], before[1][inside])
    assert torch.equal(bits(values)[inside], before[0][inside])


def test_many_in_one_launch():
    kinds = [("elements", (252, 123)), ("elements", (7, 9)), ("elements, none", (4, 4))]
    swaps = [example(*kind, torch.bfloat16, seed=i) for i, kind in enumerate(kinds)]
    expected = [(w.clone(), e, v.clone()) for w, e, v in swaps]
    tensors = {}
    for i, (weight, entries, values) in enumerate(swaps[:2]):
        tensors |= {f"{k} {i}": t for k, t in audit.named_tensors(weight, entries).items()}
        tensors[f"values {i}"] = values
    with interpreted(), traffic(tensors) as seen:
        kernel.launch(swaps)
    assert len(seen.launches) == 1 and seen.races == 0
    for (weight, _, values), (weight_, entries_, values_) in zip(swaps, expected, strict=True):
        reference.swap_selected_(weight_, entries_, values_)
        assert torch.equal(weight, weight_) and torch.equal(values, values_)


@pytest.mark.parametrize("kind", KINDS)
def test_scatter_and_gather_cast(kind, monkeypatch):
    monkeypatch.setenv("LIT_ALIGN_KERNELS", "triton")
    weight, entries, _ = example(kind, (52, 123), torch.bfloat16)
    values, expected = torch.randn(entries.numel), weight.clone()
    reference.scatter_entries_(expected, entries, values)
    with interpreted():
        scatter_selected_([(weight, entries, values)])
    assert torch.equal(weight, expected)
    gathered = torch.empty(entries.numel)
    with interpreted():
        gather_selected_([(weight, entries, gathered)])
    assert torch.equal(gathered, values.bfloat16().float())


@pytest.mark.parametrize("run", [swap_selected_, scatter_selected_, gather_selected_])
def test_rows_that_repeat(run, monkeypatch):
    """The same rows of several parameters in one launch; rows of one weight in two calls."""
    entries = entries_of("rows", (30, 123))
    batch = []
    for seed in range(3):
        weight, _, values = example("rows", (30, 123), torch.bfloat16, seed=seed)
        batch.append((weight, entries, values))
    weight, values = batch[0][0], torch.randn(2 * 123).bfloat16()
    overlapping = [(weight, Entries("rows", (30, 123), rows=entries.rows[1:3].clone()), values)]
    by_torch = [(w.clone(), e, v.clone()) for w, e, v in batch]
    overlapping_by_torch = [(by_torch[0][0], overlapping[0][1], values.clone())]
    for part in (by_torch, overlapping_by_torch):
        run(part)
    tensors = {}
    for i, (w, _, v) in enumerate([*batch, *overlapping]):
        tensors |= {f"weight {i}": w, f"values {i}": v}
    tensors |= {"rows": entries.rows, "other rows": overlapping[0][1].rows}
    monkeypatch.setenv("LIT_ALIGN_KERNELS", "triton")
    for part in (batch, overlapping):
        with interpreted(), traffic(tensors) as seen:
            run(part)
        assert len(seen.launches) == 1 and seen.races == seen.out_of_bounds == 0
    ours, theirs = [*batch, *overlapping], [*by_torch, *overlapping_by_torch]
    for (w, _, v), (w_, _, v_) in zip(ours, theirs, strict=True):
        assert torch.equal(w, w_) and torch.equal(v, v_)


def test_the_public_function_launches_the_kernel(monkeypatch):
    monkeypatch.setenv("LIT_ALIGN_KERNELS", "triton")
    monkeypatch.setattr("lit_align_kernels.dispatch.TRITON_OPERATIONS", {"swap_selected"})
    weight, entries, values = example("elements", (20, 30), torch.float32)
    tensors = audit.named_tensors(weight, entries) | {"values": values}
    with interpreted(), traffic(tensors) as seen:
        swap_selected_([(weight, entries, values)])
    assert [launch.kernel for launch in seen.launches] == ["swap_selected_kernel"]


def test_a_weight_that_is_not_contiguous_is_refused():
    entries = entries_of("all", (20, 30))
    with pytest.raises(ValueError, match="contiguous"):
        launch([(torch.zeros(30, 20).t(), entries, torch.zeros(600))])


@pytest.mark.parametrize("case", audit.traffic_cases(), ids=lambda case: case.name)
def test_bytes_moved(case):
    with interpreted(), traffic(case.tensors) as seen:
        case.call()
    assert seen.races == seen.out_of_bounds == 0
    assert case.minimum_bytes <= seen.moved <= 1.02 * case.minimum_bytes
    assert seen.by_tensor()["weight"].stored == seen.by_tensor()["values"].stored


def test_a_graph_that_needs_the_values_before_the_swap_fails(monkeypatch):
    monkeypatch.setenv("LIT_ALIGN_KERNELS", "triton")
    weight, entries = torch.randn(11, 7), entries_of("rows", (11, 7))
    x = torch.randn(7, requires_grad=True)
    y = weight @ x
    with interpreted():
        swap_selected_([(weight, entries, torch.zeros(entries.numel))])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
