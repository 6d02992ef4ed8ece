"""The same bits in every run, of a size at which programs overlap; and against torch's path."""

import pytest
import torch

from lit_align_kernels.benchmarks import masked_adamw, swap_selected
from lit_align_kernels.benchmarks.masks import random_elements, random_rows
from lit_align_kernels.entries import Entries
from lit_align_kernels.masked_adamw import masked_adamw_
from lit_align_kernels.masked_weight_grad import masked_weight_grad
from lit_align_kernels.token_logprobs import token_logprobs
from lit_align_kernels.weighted_preference_loss import TokenNPO, weighted_preference_loss

DEVICE = torch.device("cuda")
SHAPE = (1000, 777)


def same(found, again):
    return all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("case", [0, 1], ids=["elements", "rows"])
def test_masked_adamw_of_many_parameters(case):
    made = masked_adamw.cases("small", DEVICE)[case]
    runs = []
    for _ in range(2):
        inputs = made.make(3)
        for _ in range(3):
            masked_adamw_(inputs.batch, **masked_adamw.SETTINGS, grad_scale=inputs.scale)
        runs.append(
            [t for e in inputs.batch for t in (e.master, e.exp_avg, e.exp_avg_sq, e.weight)]
        )
    assert same(*runs)


@pytest.mark.parametrize("case", [0, 1], ids=["elements", "rows"])
def test_swap_of_many_parameters(case):
    made = swap_selected.cases("small", DEVICE)[case]
    runs = [made.implementations["lit-align"](made.make(2)) for _ in range(2)]
    assert same(*runs) and same(runs[0], made.expected(made.make(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["all", "rows", "heads", "elements"])
def test_masked_weight_grad(kind, dtype):
    torch.seed()
    entries = {
        "all": lambda: Entries("all", SHAPE),
        "rows": lambda: random_rows(SHAPE, 0.1, DEVICE),
        "heads": lambda: random_rows((1024, 777), 0.2, DEVICE, run=64),
        "elements": lambda: random_elements(SHAPE, 0.1, DEVICE),
    }[kind]()
    rows, columns = entries.shape
    a = torch.randn(700, rows, device=DEVICE).to(dtype)
    b = torch.randn(700, columns, device=DEVICE).to(dtype)
    found, again = masked_weight_grad(a, b, entries), masked_weight_grad(a, b, entries)
    assert torch.equal(found, again)
    exact = (a.double().t() @ b.double()).flatten()
    if kind == "elements":
        exact = exact[entries.positions]
    elif kind != "all":
        exact = exact.view(rows, columns)[entries.rows].flatten()
    assert (found - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads(dtype):
    torch.seed()
    hidden = torch.randn(900, 256, device=DEVICE).to(dtype).requires_grad_()
    weight = (torch.randn(50257, 256, device=DEVICE) / 8).to(dtype).requires_grad_()
    targets = torch.randint(50257, (900,), device=DEVICE)
    ref, weights = -torch.rand(900, device=DEVICE) * 9, torch.rand(900, device=DEVICE)

    def logps():
        found = token_logprobs(hidden, weight, targets, max_logits_bytes=20 << 20)
        return found, (found * weights).sum()

    def loss():
        total, found = weighted_preference_loss(
            hidden, weight, targets, TokenNPO(0.1, ref, weights), max_logits_bytes=20 << 20
        )
        return found, total

    for run in (logps, loss):
        results = []
        for _ in range(2):
            found, total = run()
            results.append([found, total, *torch.autograd.grad(total, (hidden, weight))])
        assert same(*results)
        logits = hidden.detach().double() @ weight.detach().double().t()
        exact = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
        eps = 1e-6 if dtype == torch.float32 else 4e-3
        assert (results[0][0].detach() - exact).norm() <= eps * exact.norm()
