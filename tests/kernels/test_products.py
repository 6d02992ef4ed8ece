"""Products of views, empty ones included, by either library."""

import pytest
import torch

from lit_align_kernels.products import (
    _onednn,
    add_product,
    fp32_product_by_eights,
    product,
    write_by_eights,
    write_product,
    write_sum_by_eights,
)

SHAPES = [(1, 1, 1), (252, 123, 507), (7, 600, 33), (64, 64, 64), (0, 5, 3), (5, 0, 3), (5, 3, 0)]


@pytest.fixture(params=[True, False], ids=["onednn", "blas"])
def _library(request):
    with torch.backends.mkldnn.flags(enabled=request.param), torch.no_grad():
        yield


def factors(n, k, m, layout):
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(n, k, generator=g), torch.randn(k, m, generator=g)
    match layout:
        case "transposed":
            return a.t().contiguous().t(), b.t().contiguous().t()
        case "columns of a wider one":
            wide = torch.full((n, k + 9), torch.nan)
            wide[:, 4 : 4 + k] = a
            return wide[:, 4 : 4 + k], b
    return a, b


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["plain", "transposed", "columns of a wider one"])
def test_products(shape, layout):
    a, b = factors(*shape, layout)
    exact = a.double() @ b.double()
    tolerance = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(product(a, b).double(), exact, **tolerance)
    out = torch.full((shape[2] + 2, shape[0]), torch.nan).t()[:, 1:-1]
    write_product(out, a, b)
    torch.testing.assert_close(out.double(), exact, **tolerance)
    add_product(out, a, b)
    torch.testing.assert_close(out.double(), 2 * exact, **tolerance)
    wide = torch.empty(shape[0], shape[2], dtype=torch.float64)
    write_product(wide, a, b)
    torch.testing.assert_close(wide, exact, **tolerance)


def test_a_recorded_graph_and_other_dtypes_stay_with_torch():
    a = torch.ones(2, 3)
    assert _onednn(a, a.t()) is None
    with torch.no_grad():
        assert _onednn(a.bfloat16(), a.bfloat16().t()) is None
    grown = a.clone().requires_grad_()
    product(grown, a.t()).sum().backward()
    assert grown.grad is not None


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="oneDNN is for AVX-512 processors"
)
def test_onednn_is_taken_where_it_is_the_faster():
    with torch.no_grad():
        assert _onednn(torch.ones(2, 3), torch.ones(3, 2)) is not None


@pytest.mark.parametrize("size", [1, 5, 8, 19, 24])
def test_products_by_eights(size):
    """A GPU's products in parts: sums and columns that 8 does not divide."""
    a, b = torch.randn(7, size), torch.randn(size, 6)
    out = torch.full((7, 6), torch.nan)
    write_sum_by_eights(out, a, b)
    torch.testing.assert_close(out, a @ b)
    c = torch.randn(6, size)
    wide = torch.full((7, size + 3), torch.nan)
    write_by_eights(wide[:, :size], out, c)
    torch.testing.assert_close(wide[:, :size], out @ c)
    assert wide[:, size:].isnan().all()
    found = torch.full((size, 6), torch.nan)
    fp32_product_by_eights(found, a, out, False)
    torch.testing.assert_close(found, a.t() @ out)
    fp32_product_by_eights(found, a, out, True)
    torch.testing.assert_close(found, 2 * a.t() @ out)
    found[:] = torch.nan
    fp32_product_by_eights(found, a[:0], out[:0], False)
    assert (found == 0).all()
