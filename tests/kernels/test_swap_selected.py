import pytest
import torch

from lit_align_kernels.swap_selected import (
    gather_entries,
    gather_selected_,
    scatter_entries_,
    scatter_selected_,
    swap_selected_,
)
from tests.kernels.cases import KINDS, KINDS_3D, elements, entries_of, flat_order

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [(kind, (11, 7)) for kind in KINDS] + [(kind, (3, 5, 7)) for kind in KINDS_3D]


def bits(tensor):
    """The bytes of a tensor, so that NaN equals NaN and −0 differs from 0."""
    return tensor.contiguous().view(torch.uint8)


def weight_of(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    weight.view(-1)[:4] = torch.tensor([torch.nan, -0.0, torch.inf, -torch.inf], dtype=dtype)
    return weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_gather_reads_in_storage_order(kind, shape, dtype):
    weight, entries = weight_of(shape, dtype), entries_of(kind, shape)
    found = gather_entries(weight, entries)
    assert found.dtype == dtype
    assert torch.equal(bits(found), bits(weight.reshape(-1)[flat_order(entries)]))
    found.zero_()  # a copy: the weight stays
    assert torch.equal(bits(weight), bits(weight_of(shape, dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_scatter_writes_the_entries_and_nothing_else(kind, shape, dtype):
    weight, entries = weight_of(shape, dtype), entries_of(kind, shape)
    values = torch.randn(entries.numel)  # fp32 masters, cast on the way
    expected = weight.clone()
    expected.view(-1)[flat_order(entries)] = values.to(dtype)
    scatter_entries_(weight, entries, values)
    assert torch.equal(bits(weight), bits(expected))
    assert torch.equal(bits(gather_entries(weight, entries)), bits(values.to(dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_swap_exchanges_and_swapping_twice_changes_no_bit(kind, shape, dtype):
    weight, entries = weight_of(shape, dtype), entries_of(kind, shape)
    values = torch.randn(entries.numel).to(dtype)
    before, kept = weight.clone(), values.clone()
    swap_selected_([(weight, entries, values)])
    assert torch.equal(bits(values), bits(gather_entries(before, entries)))
    expected = before.clone()
    expected.view(-1)[flat_order(entries)] = kept
    assert torch.equal(bits(weight), bits(expected))
    swap_selected_([(weight, entries, values)])
    assert torch.equal(bits(weight), bits(before))
    assert torch.equal(bits(values), bits(kept))


@pytest.mark.parametrize("kind", ["all", "elements", "elements, one"])
def test_vectors(kind):
    weight, entries = torch.arange(9.0), entries_of(kind, (9,))
    values = -torch.ones(entries.numel)
    swap_selected_([(weight, entries, values)])
    assert torch.equal(values, torch.arange(9.0)[flat_order(entries)])
    assert (weight[flat_order(entries)] == -1).all()


def test_a_weight_that_requires_grad_is_written_without_a_graph():
    weight = torch.zeros(4, 3, requires_grad=True)
    scatter_entries_(weight, entries_of("rows", (4, 3)), torch.ones(3, requires_grad=True))
    assert weight.grad_fn is None
    assert weight.sum() == 3


def test_gather_follows_autograd():
    weight = torch.randn(4, 3, requires_grad=True)
    gather_entries(weight, elements((4, 3), torch.tensor([1, 5]))).sum().backward()
    assert weight.grad.view(-1).nonzero().flatten().tolist() == [1, 5]


@pytest.mark.parametrize("values", [torch.float32, torch.float16])
def test_many_are_scattered_and_gathered_in_one_call(values):
    batch = []
    for kind in KINDS:
        weight, entries = weight_of((11, 7), torch.bfloat16), entries_of(kind, (11, 7))
        batch.append((weight, entries, torch.randn(entries.numel).to(values)))
    expected = [weight.clone() for weight, _, _ in batch]
    scatter_selected_(batch)
    for (weight, entries, new), other in zip(batch, expected, strict=True):
        scatter_entries_(other, entries, new)
        assert torch.equal(bits(weight), bits(other))
        new.fill_(torch.nan)
    gather_selected_(batch)
    for weight, entries, found in batch:
        assert found.dtype == values
        assert torch.equal(found, gather_entries(weight, entries).to(values))


def test_a_graph_that_needs_rows_as_they_were_fails():
    weight, entries = torch.randn(11, 7), entries_of("rows", (11, 7))
    x = torch.randn(7, requires_grad=True)
    y = weight @ x
    scatter_entries_(weight, entries, torch.zeros(entries.numel))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
