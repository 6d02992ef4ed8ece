"""The Triton kernel in the interpreter: values, memory it may touch, tiles it may compute."""

import pytest
import torch

from lit_align_kernels.audit.interpreter import interpreted
from lit_align_kernels.audit.traffic import traffic
from lit_align_kernels.entries import Entries
from lit_align_kernels.masked_weight_grad import audit, kernel, masked_weight_grad
from lit_align_kernels.masked_weight_grad.tiles import RUN, TILINGS, Tiling, plan
from tests.kernels.cases import KINDS, elements, entries_of, flat_order

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = (Tiling(32, 32, 16, 4, 2),)
LARGE = (Tiling(128, 128, 64, 8, 3),)


def factors(n, p, q, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(n, p, generator=generator).to(dtype)
    return a, torch.randn(n, q, generator=generator).to(dtype)


def kernel_grad(a, b, entries, out=None, accumulate=False, tilings=None):
    """Into NaNs where nothing is accumulated; raises where a lane leaves its tensor."""
    out = torch.full((entries.numel,), torch.nan) if out is None else out
    with interpreted(), traffic() as seen:
        kernel.masked_weight_grad(a, b, entries, out, accumulate, tilings)
    assert seen.races == 0
    stored = seen.by_tensor()["out_ptr"].stored if entries.numel else 0
    assert stored == 4 * entries.numel  # every selected entry once, and nothing else
    return out, sum(launch.programs for launch in seen.launches)


def assert_within_budget(found, a, b, entries, factor=2.0):
    """At most twice as far from fp64 as the dense fp32 product of the same factors."""
    exact = (a.double().t() @ b.double()).reshape(-1)[flat_order(entries)]
    dense = (a.float().t() @ b.float()).reshape(-1)[flat_order(entries)].double()
    assert found.shape == exact.shape
    assert not found.isnan().any()
    if found.numel():
        budget = factor * (dense - exact).abs().max() + 1e-7 * exact.abs().max()
        assert (found.double() - exact).abs().max() <= budget


def test_the_public_function_launches_the_kernel(monkeypatch):
    monkeypatch.setenv("LIT_ALIGN_KERNELS", "triton")
    a, b = factors(20, 52, 23)
    entries = entries_of("elements", (52, 23))
    with interpreted(), traffic() as seen:
        found = masked_weight_grad(a, b, entries)
        assert masked_weight_grad(a, b, entries, out=found, accumulate=True) is found
        with pytest.raises(ValueError, match="fp32, bf16 and fp16"):
            masked_weight_grad(a.double(), b.double(), entries)
    assert [launch.kernel for launch in seen.launches] == ["masked_product_kernel"] * 2
    assert_within_budget(found / 2, a, b, entries)


def rows_of(shape, rows):
    return Entries("rows", shape, rows=torch.as_tensor(rows))


def blocks_of(shape, corners, edge):
    chosen = torch.zeros(shape, dtype=torch.bool)
    for row, column in corners:
        chosen[row : row + edge, column : column + edge] = True
    return elements(shape, chosen.reshape(-1).nonzero()[:, 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tilings", [SMALL, None], ids=["small tiles", "the device's"])
def test_every_kind(kind, dtype, tilings):
    a, b = factors(61, 52, 123, dtype)
    entries = entries_of(kind, (52, 123))
    assert_within_budget(kernel_grad(a, b, entries, tilings=tilings)[0], a, b, entries)


@pytest.mark.parametrize("shape", [(252, 123), (123, 507), (144, 160)])
@pytest.mark.parametrize("kind", ["all", "rows", "columns", "elements", "elements, every"])
def test_tiles_of_128(kind, shape):
    a, b = factors(33, *shape, torch.bfloat16)
    entries = entries_of(kind, shape)
    assert_within_budget(kernel_grad(a, b, entries, tilings=LARGE)[0], a, b, entries)


@pytest.mark.parametrize("n", [0, 1, 16, 17])
@pytest.mark.parametrize("kind", ["all", "rows", "columns", "elements"])
def test_few_tokens(kind, n):
    a, b = factors(n, 52, 23)
    entries = entries_of(kind, (52, 23))
    found, _ = kernel_grad(a, b, entries, tilings=SMALL)
    assert_within_budget(found, a, b, entries)
    assert n or not found.any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (507, 8)])
@pytest.mark.parametrize("kind", ["all", "rows", "columns", "elements"])
def test_narrow_weights(kind, shape):
    a, b = factors(5, *shape)
    entries = entries_of(kind, shape)
    assert_within_budget(kernel_grad(a, b, entries, tilings=SMALL)[0], a, b, entries)


def padded(x, columns, fill):
    wide = torch.full((x.shape[0], columns), fill, dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


@pytest.mark.parametrize("kind", ["all", "rows", "columns", "elements"])
@pytest.mark.parametrize(
    "lay",
    [
        lambda x: padded(x, 56, torch.nan),  # as rows of logits are padded: nothing is copied
        lambda x: padded(x, 57, torch.nan),  # rows that do not begin at multiples of 16 bytes
        lambda x: x.t().contiguous().t(),
        lambda x: torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape),  # not the start
    ],
    ids=["padded", "odd stride", "transposed", "odd address"],
)
def test_layouts_of_the_factors(kind, lay):
    a, b = factors(20, 52, 51, torch.bfloat16)
    entries = entries_of(kind, (52, 51))
    found, _ = kernel_grad(lay(a), lay(b), entries, tilings=SMALL)
    assert_within_budget(found, a, b, entries)


def test_an_expanded_factor():
    a, b = torch.randn(24).expand(20, 24), torch.ones(()).expand(20, 16)
    entries = entries_of("elements", (24, 16))
    assert_within_budget(kernel_grad(a, b, entries)[0], a, b, entries)


def test_padded_rows_are_not_copied_and_odd_ones_are():
    x = torch.randn(20, 51)
    wide = padded(x, 56, 0.0)
    aligned, length = kernel._aligned(wide)
    assert aligned.data_ptr() == wide.data_ptr() and length == 56
    for odd in (x, wide[:, 1:], wide.t(), wide[:0]):
        aligned, _ = kernel._aligned(odd)
        assert aligned.stride(0) % 8 == 0 and aligned.data_ptr() % 16 == 0
        assert torch.equal(aligned, odd)
    cut = torch.randn(20 * 56 - 5).as_strided((20, 51), (56, 1))  # its last row has no padding
    assert kernel._aligned(cut)[0].data_ptr() != cut.data_ptr()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_are_gathered_as_they_lie_and_other_rows_are_packed(dtype, axis):
    shape = (192, 72) if axis == 0 else (72, 192)
    a, b = factors(33, *shape, dtype)
    for first, in_runs in ((64, True), (72, False)):
        entries = Entries("rows", shape, axis, rows=torch.arange(first, first + 64))
        found, _ = kernel_grad(a, b, entries, tilings=LARGE)
        assert_within_budget(found, a, b, entries)
        assert (plan(entries, LARGE, 1, CPU).runs is not None) == in_runs
        assert (plan(entries, LARGE, 1, CPU).packed is not None) == (not in_runs)


def test_several_runs_and_the_end_of_the_weight():
    a, b = factors(33, 160, 40, torch.bfloat16)
    rows = torch.cat([torch.arange(s, s + RUN) for s in (0, 48, 80, 144)])
    entries = rows_of((160, 40), rows)
    assert plan(entries, SMALL, 1, CPU).runs is not None
    assert_within_budget(kernel_grad(a, b, entries, tilings=SMALL)[0], a, b, entries)


def test_a_tile_without_a_selected_entry_is_skipped():
    corners = ((0, 0), (32, 64), (64, 32), (128, 96))
    entries = blocks_of((160, 128), corners, edge=32)
    a, b = factors(40, 160, 128, torch.bfloat16)
    found, programs = kernel_grad(a, b, entries, tilings=SMALL)
    assert programs == len(corners)  # of 5 x 4 tiles
    assert_within_budget(found, a, b, entries)
    rows = rows_of((160, 128), [5, 70])
    assert kernel_grad(a, b, rows, tilings=SMALL)[1] == 4  # 2 rows make one tile row of 128 columns


def test_blocks_that_straddle_tiles_and_words():
    entries = blocks_of((100, 123), ((10, 20), (50, 70), (84, 107)), edge=16)
    a, b = factors(40, 100, 123, torch.bfloat16)
    for tilings in (SMALL, LARGE):
        assert_within_budget(kernel_grad(a, b, entries, tilings=tilings)[0], a, b, entries)


@pytest.mark.parametrize("tilings", [SMALL, LARGE], ids=["32", "128"])
@pytest.mark.parametrize("kind", ["all", "rows", "columns", "elements"])
def test_accumulate_over_chunks_of_tokens(kind, tilings):
    a, b = factors(57, 52, 123)
    entries = entries_of(kind, (52, 123))
    out = torch.full((entries.numel,), torch.nan)
    for i, (start, stop) in enumerate(((0, 20), (20, 21), (21, 57))):
        kernel_grad(a[start:stop], b[start:stop], entries, out, i > 0, tilings)
    assert_within_budget(out, a, b, entries, factor=4.0)
    before = out.clone()
    kernel_grad(a[:0], b[:0], entries, out, True, tilings)
    assert torch.equal(out, before)


@pytest.mark.parametrize("kind", ["rows", "elements"])
def test_the_same_bits_every_time(kind):
    a, b = factors(61, 52, 123, torch.bfloat16)
    entries = entries_of(kind, (52, 123))
    assert torch.equal(kernel_grad(a, b, entries)[0], kernel_grad(a, b, entries)[0])


def test_what_is_not_selected_reaches_no_result():
    a, b = factors(20, 64, 32)
    entries = rows_of((64, 32), torch.arange(16, 32))
    clean, _ = kernel_grad(a, b, entries)
    a[:, :16] = torch.nan
    a[:, 32:] = torch.inf
    assert torch.equal(kernel_grad(a, b, entries)[0], clean)


def test_positions_beyond_two_to_the_31():
    shape = (2**16 + 8, 2**15 + 16)
    positions = torch.tensor([5, 2**31 - 1, 2**31, 2**31 + 77, shape[0] * shape[1] - 1])
    row, column = positions // shape[1], positions % shape[1]
    starts = torch.arange(shape[0] + 1) * shape[1]
    entries = Entries(
        "elements",
        shape,
        positions=positions,
        row_offsets=torch.searchsorted(positions, starts),
    )
    a, b = factors(3, *shape)
    found, programs = kernel_grad(a, b, entries, tilings=LARGE)
    pairs = zip(row.tolist(), column.tolist(), strict=True)
    assert programs == len({(r // 128, c // 128) for r, c in pairs})
    torch.testing.assert_close(found, (a[:, row] * b[:, column]).sum(0))


def test_small_tiles_for_blocks_and_for_small_weights():
    tilings = TILINGS["sm_90"]["half"]
    large, medium, small = tilings
    scattered = entries_of("elements", (256, 256))
    assert plan(scattered, tilings, 1, CPU).tiling == large
    assert plan(blocks_of((256, 256), ((64, 32),), 32), tilings, 1, CPU).tiling == small
    assert plan(rows_of((256, 256), torch.arange(64)), tilings, 1, CPU).tiling == medium
    assert plan(entries_of("all", (256, 256)), tilings, 132, CPU).tiling == small


def test_the_plan_is_made_once():
    entries = entries_of("elements", (52, 23))
    assert plan(entries, SMALL, 1, CPU) is plan(entries, SMALL, 1, CPU)
    assert plan(entries, SMALL, 1, CPU) is not plan(entries, LARGE, 1, CPU)


def test_neighbouring_tiles_follow_one_another():
    tiles = plan(Entries("all", (32 * 20, 32 * 3)), SMALL, 1, CPU).tiles
    assert len({(int(r), int(c)) for r, c in tiles}) == 60
    assert tiles[:9].tolist() == [[r, 0] for r in range(8)] + [[0, 1]]


def test_fp32_as_torch_is_told(monkeypatch):
    assert kernel.arithmetic(torch.bfloat16) == "half"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert kernel.arithmetic(torch.float32) == "ieee"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert kernel.arithmetic(torch.float32) == "tf32"


@pytest.mark.parametrize("case", audit.traffic_cases(), ids=lambda case: case.name)
def test_traffic(case):
    with interpreted(), traffic(case.tensors) as seen:
        case.call()
    assert seen.races == 0 and seen.out_of_bounds == 0
    assert seen.unique <= 1.05 * case.minimum_bytes
    assert seen.sectors <= 1.25 * seen.moved


def test_packing_rows_counts_into_the_traffic():
    """26 of 256 rows, 20 bytes apart: all sectors of 192 tokens are read, 32 columns written."""
    packed = {case.name: case.extra_bytes for case in audit.traffic_cases()}
    assert packed.pop("10 % of rows") == 192 * (256 * 2 + 32 * 2)
    assert not any(packed.values())
