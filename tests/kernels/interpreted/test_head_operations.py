"""The public operations on a head, with Triton's kernels in them, against autograd in fp64."""

import pytest
import torch

from lit_align_kernels.audit.interpreter import interpreted
from lit_align_kernels.token_logprobs import WeightHandle, token_logprobs
from lit_align_kernels.weighted_preference_loss import weighted_preference_loss
from tests.kernels.cases import entries_of, flat_order
from tests.kernels.test_weighted_preference_loss import (
    LOSSES,
    Case,
    assert_within_budget,
    dense,
    found_of,
    objective_of,
)

BUDGET = 15 * 507 * 4  # two phases for the longest groups
RUNS = [(torch.bfloat16, {}), (torch.float32, {"logit_scale": 1.7, "soft_cap": 3.0})]


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setenv("LIT_ALIGN_KERNELS", "triton")
    with interpreted():
        yield


@pytest.mark.parametrize(("dtype", "settings"), RUNS)
@pytest.mark.parametrize("loss", LOSSES)
def test_one_pass(loss, dtype, settings):
    case = Case(dtype)
    exact = dense(case, case.leaves(torch.float64), LOSSES[loss], **settings)
    plain = dense(case, case.leaves(dtype), LOSSES[loss], **settings)
    hidden, weight, bias = leaves = case.leaves(dtype)
    entries = entries_of("elements", weight.shape)
    selected = torch.zeros(entries.numel, requires_grad=True)
    handle = WeightHandle(weight.detach(), selected, entries, bias)
    total, logps = weighted_preference_loss(
        hidden,
        handle,
        case.targets,
        max_logits_bytes=BUDGET,
        **objective_of(case, loss),
        **settings,
    )
    total.backward()
    leaves[1] = None
    found = {**found_of(total, logps, leaves), "weight": selected.grad.double()}
    if dtype != torch.float32:
        del found["loss"]  # of one number the rounding is a matter of luck
    for run in (exact, plain):
        run["weight"] = run["weight"].reshape(-1)[flat_order(entries)]
    assert_within_budget(found, plain, exact)


@pytest.mark.parametrize(("dtype", "settings"), RUNS)
def test_token_logprobs(dtype, settings):
    case = Case(dtype, ignored=False)

    def weighted(case, logps):
        return (logps * case.weights).sum()

    exact = dense(case, case.leaves(torch.float64), weighted, **settings)
    plain = dense(case, case.leaves(dtype), weighted, **settings)
    leaves = case.leaves(dtype)
    logps = token_logprobs(
        leaves[0], leaves[1], case.targets, bias=leaves[2], max_logits_bytes=BUDGET, **settings
    )
    total = weighted(case, logps)
    total.backward()
    found = found_of(total, logps, leaves)
    del found["loss"]  # of one number the rounding is a matter of luck
    assert_within_budget(found, plain, exact)
