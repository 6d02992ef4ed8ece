"""Weights of more than 2³¹ entries, in bf16: a few gigabytes."""

import math

import pytest
import torch

from lit_align_kernels import launch_tables
from lit_align_kernels.entries import Entries
from lit_align_kernels.masked_adamw import AdamWEntry, masked_adamw_
from lit_align_kernels.masked_weight_grad import masked_weight_grad
from lit_align_kernels.swap_selected import gather_selected_, swap_selected_

# One after the other: together they would not fit a card.
pytestmark = pytest.mark.xdist_group("large")
DEVICE = torch.device("cuda")
SHAPE = (65_544, 32_784)
NUMEL = math.prod(SHAPE)
ENDS = [0, 5, 2**31 - 1, 2**31, 2**31 + 77, NUMEL - 2, NUMEL - 1]
SETTINGS = {"lr": 0.03, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.2}


def entries_of(kind):
    """The first, the last and those around 2³¹; clusters for a bitmap, scattered for a list."""
    if kind == "rows":
        rows = torch.tensor([0, 1, 2**31 // SHAPE[1], SHAPE[0] - 1], device=DEVICE)
        return Entries("rows", SHAPE, rows=rows)
    if kind == "all":
        return Entries("all", SHAPE)
    step = 3 if kind == "bitmap" else 4001
    first = 0 if kind == "list" else 2**31 - 1_000_000
    positions = torch.arange(first, NUMEL if kind == "list" else 2**31 + 1_000_000, step,
                             device=DEVICE)  # fmt: skip
    positions = torch.cat([positions, torch.tensor(ENDS, device=DEVICE)]).unique()
    starts = torch.arange(SHAPE[0] + 1, device=DEVICE) * SHAPE[1]
    offsets = torch.searchsorted(positions, starts)
    return Entries("elements", SHAPE, positions=positions, row_offsets=offsets)


def flat_order(entries):
    if entries.kind == "rows":
        return (entries.rows[:, None] * SHAPE[1] + torch.arange(SHAPE[1], device=DEVICE)).flatten()
    return entries.positions


@pytest.fixture(params=["rows", "list", "bitmap"])
def entries(request, monkeypatch):
    if request.param == "bitmap":
        monkeypatch.setattr(launch_tables, "MOST_POSITIONS_PER_ENTRY", 2**40)
        monkeypatch.setattr(launch_tables, "MOST_WORDS_PER_ENTRY_OF_A_BLOCK", 2**40)
    return entries_of(request.param)


def checksum(weight, at):
    """Of all that is not selected: exact, in int64."""
    bits = weight.view(torch.int16).flatten()
    chosen = bits[at].long().sum()
    return sum(part.long().sum() for part in bits.split(1 << 27)) - chosen


def test_swap(entries):
    weight = torch.empty(SHAPE, dtype=torch.bfloat16, device=DEVICE).normal_()
    at = flat_order(entries)
    values = torch.randn(entries.numel, device=DEVICE).bfloat16()
    old, given, rest = weight.view(-1)[at], values.clone(), checksum(weight, at)
    swap_selected_([(weight, entries, values)])
    assert torch.equal(values, old) and torch.equal(weight.view(-1)[at], given)
    assert checksum(weight, at) == rest
    gathered = torch.full_like(given, torch.nan, dtype=torch.float32)
    gather_selected_([(weight, entries, gathered)])
    assert torch.equal(gathered, given.float())


def test_masked_adamw(entries):
    weight = torch.empty(SHAPE, dtype=torch.bfloat16, device=DEVICE).normal_()
    at = flat_order(entries)
    n, rest = entries.numel, checksum(weight, at)
    master = weight.view(-1)[at].float()
    grad, exp_avg, exp_avg_sq = (torch.randn(n, device=DEVICE) for _ in range(3))
    exp_avg_sq.square_()
    entry = AdamWEntry(
        master, grad, exp_avg, exp_avg_sq, torch.zeros((), device=DEVICE), weight, entries
    )
    m = 0.8 * exp_avg.double() + 0.2 * grad.double()
    v = 0.95 * exp_avg_sq.double() + 0.05 * grad.double().square()
    root = (v / 0.05).sqrt() + 1e-6
    exact = master.double() * (1 - 0.03 * 0.2) - 0.03 * m / 0.2 / root
    masked_adamw_([entry], **SETTINGS)
    torch.testing.assert_close(master.double(), exact, rtol=1e-6, atol=1e-6)
    assert torch.equal(weight.view(-1)[at], master.bfloat16())
    assert checksum(weight, at) == rest


def test_a_whole_parameter():
    n = 2**31 + 1000
    master = torch.ones(n, dtype=torch.bfloat16, device=DEVICE)
    grad = torch.ones(n, dtype=torch.bfloat16, device=DEVICE)
    moments = [torch.zeros(n, device=DEVICE) for _ in range(2)]
    entry = AdamWEntry(master, grad, *moments, torch.zeros((), device=DEVICE))
    masked_adamw_([entry], **SETTINGS | {"lr": 0.5}, stochastic_rounding_seed=1)
    # 1 − 0.5·0.2 − 0.5 is between two numbers of bf16: every entry became one of them.
    assert master.min() >= 0.398 and master.max() <= 0.402
    assert moments[0].min() == moments[0].max() and (moments[1] > 0).all()


@pytest.mark.parametrize("kind", ["all", "rows", "bitmap"])
def test_masked_weight_grad(kind):
    entries = entries_of(kind)
    a = torch.randn(40, SHAPE[0], device=DEVICE).bfloat16()
    b = torch.randn(40, SHAPE[1], device=DEVICE).bfloat16()
    out = torch.full((entries.numel,), torch.nan, device=DEVICE)
    assert masked_weight_grad(a, b, entries, out=out) is out
    assert all(part.isfinite().all() for part in out.split(1 << 28))
    at = torch.randint(entries.numel, (20_000,), device=DEVICE)
    at[:2] = torch.tensor([0, entries.numel - 1], device=DEVICE)
    place = at if kind == "all" else flat_order(entries)[at]
    row, column = place // SHAPE[1], place % SHAPE[1]
    exact = (a[:, row].double() * b[:, column].double()).sum(0)
    torch.testing.assert_close(out[at].double(), exact, rtol=1e-5, atol=1e-4)


def test_factors_of_more_than_2_to_the_31():
    """As gradients of logits are for a long batch: the rows of `a` are far apart."""
    vocabulary, tokens, width = 151_680, 14_300, 64
    a = torch.empty(tokens, vocabulary, dtype=torch.bfloat16, device=DEVICE).normal_()
    b = torch.randn(tokens, width, device=DEVICE).bfloat16()
    entries = Entries("rows", (vocabulary, width),
                      rows=torch.tensor([0, 7, vocabulary - 1], device=DEVICE))  # fmt: skip
    whole = Entries("all", (vocabulary, width))
    exact = a[:, entries.rows].double().t() @ b.double()
    for chosen in (entries, whole):
        found = masked_weight_grad(a, b, chosen).view(-1, width)
        found = found if chosen is entries else found[entries.rows]
        assert (found - exact).norm() <= 1e-4 * exact.norm()  # fp32 sums of 14,300: 2e-5 measured
