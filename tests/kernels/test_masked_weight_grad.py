import pytest
import torch

from lit_align_kernels.masked_weight_grad import gather_block, masked_weight_grad
from lit_align_kernels.masked_weight_grad import reference as reference_module
from tests.kernels.cases import KINDS, entries_of, flat_order


def factors(n, p, q, dtype):
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(n, p, generator=generator).to(dtype)
    return a, torch.randn(n, q, generator=generator).to(dtype)


def assert_within_budget(found, a, b, entries):
    """No further from fp64 than the dense product in the same dtype."""
    exact = (a.double().t() @ b.double()).reshape(-1)[flat_order(entries)]
    dense = (a.t() @ b).reshape(-1)[flat_order(entries)]
    assert found.shape == exact.shape
    assert found.dtype == torch.float32
    assert not found.isnan().any()
    if found.numel():
        budget = (dense.double() - exact).abs().max() + 1e-6 * exact.abs().max()
        assert (found.double() - exact).abs().max() <= budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [0, 1, 61])
def test_equals_the_dense_product_at_the_entries(monkeypatch, kind, dtype, n):
    monkeypatch.setattr(reference_module, "BLOCK_ENTRIES", 100)  # many blocks, the last one short
    a, b = factors(n, 52, 23, dtype)
    entries = entries_of(kind, (52, 23))
    assert_within_budget(masked_weight_grad(a, b, entries), a, b, entries)


@pytest.mark.parametrize("kind", KINDS)
def test_odd_shapes_in_one_block(kind):
    a, b = factors(252, 507, 123, torch.float32)
    entries = entries_of(kind, (507, 123))
    assert_within_budget(masked_weight_grad(a, b, entries), a, b, entries)


@pytest.mark.parametrize("kind", KINDS)
def test_linear_and_conv1d_against_autograd(kind):
    x = torch.randn(17, 13, dtype=torch.float64)
    linear = torch.randn(29, 13, dtype=torch.float64, requires_grad=True)
    conv1d = linear.detach().t().clone().requires_grad_()
    dy = torch.randn(17, 29, dtype=torch.float64)
    ((x @ linear.t()) * dy).sum().backward()
    ((x @ conv1d) * dy).sum().backward()
    x, dy = x.float(), dy.float()
    for weight, (a, b) in ((linear, (dy, x)), (conv1d, (x, dy))):
        entries = entries_of(kind, tuple(weight.shape))
        expected = weight.grad.reshape(-1)[flat_order(entries)].float()
        torch.testing.assert_close(masked_weight_grad(a, b, entries), expected)


def test_by_hand():
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0, 7.0]])  # [[3, 5, 7], [6, 10, 14]]
    for kind, expected in (
        ("all", [3, 5, 7, 6, 10, 14]),
        ("rows, every", [3, 5, 7, 6, 10, 14]),
        ("elements, one", [6]),
    ):
        assert masked_weight_grad(a, b, entries_of(kind, (2, 3))).tolist() == expected
    columns = entries_of("columns", (2, 3))
    columns.rows = torch.tensor([0, 2])
    assert masked_weight_grad(a, b, columns).tolist() == [3, 6, 7, 14]  # column after column


def test_non_contiguous_factors():
    a, b = factors(20, 12, 9, torch.float32)
    entries = entries_of("elements", (12, 9))
    strided = masked_weight_grad(a.t().contiguous().t(), b.repeat(1, 2)[:, :9], entries)
    torch.testing.assert_close(strided, masked_weight_grad(a, b, entries))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_accumulate_over_chunks_of_tokens(monkeypatch, kind, dtype):
    monkeypatch.setattr(reference_module, "BLOCK_ENTRIES", 100)
    a, b = factors(57, 52, 23, dtype)
    entries = entries_of(kind, (52, 23))
    out = torch.full((entries.numel,), torch.nan)
    expected = torch.zeros(entries.numel)
    for i, (start, stop) in enumerate(((0, 20), (20, 21), (21, 57))):
        part = a[start:stop], b[start:stop], entries
        assert masked_weight_grad(*part, out=out, accumulate=i > 0) is out
        expected += masked_weight_grad(*part)
    torch.testing.assert_close(out, expected)


def test_out_that_does_not_fit_is_an_error():
    a, b, entries = torch.ones(4, 2), torch.ones(4, 7), entries_of("elements, every", (2, 7))
    good = torch.empty(entries.numel)
    for out in (torch.empty(entries.numel + 1), good.double(), good.repeat(2)[::2]):
        with pytest.raises(ValueError, match="out is"):
            masked_weight_grad(a, b, entries, out=out)
    with pytest.raises(ValueError, match="give it"):
        masked_weight_grad(a, b, entries, accumulate=True)
    with pytest.raises(ValueError, match="in one dtype"):
        masked_weight_grad(a, b.bfloat16(), entries)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1, 4, 11, 20])
def test_gather_block_by_block(kind, step):
    dense, entries = torch.randn(11, 7), entries_of(kind, (11, 7))
    out = torch.full((entries.numel,), torch.nan)
    for start in range(0, 11, step):
        stop = min(11, start + step)
        gather_block(dense[start:stop], entries, start, stop, out)
    assert torch.equal(out, dense.reshape(-1)[flat_order(entries)])


@pytest.mark.parametrize("sizes", [(4, 3, 7), (4, 2, 5), (5, 2, 7)])
def test_factors_that_do_not_fit_are_an_error(sizes):
    n, p, q = sizes
    a, b = torch.ones(4, p), torch.ones(n, q)
    with pytest.raises(ValueError, match="do not give a weight"):
        masked_weight_grad(a, b, entries_of("elements", (2, 7)))
