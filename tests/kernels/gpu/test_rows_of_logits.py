"""Rows of the vocabularies of real models, and the same bits in every run."""

import pytest
import torch

import lit_align_kernels.token_logprobs.kernel as rows
from lit_align_kernels.weighted_preference_loss.kernel import npo_rows_

DEVICE = torch.device("cuda")
VOCABULARIES = (50257, 151665, 262144)
# Of the largest gradient: the kernel's own rounding, and that of the dtype.
EPS = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def raw_logits(count, vocabulary, dtype, spread=3.0):
    """Fresh values every time; rows as the operations allocate them, NaN between them."""
    torch.seed()
    logits = rows.padded_logits(count, vocabulary, dtype, DEVICE)
    return logits.copy_(spread * torch.randn(count, vocabulary, device=DEVICE))


def clone(logits):
    """Laid out like them: another stride would be another order of sums."""
    count, vocabulary = logits.shape
    return rows.padded_logits(count, vocabulary, logits.dtype, DEVICE).copy_(logits)


def in_fp64(raw, targets, cap):
    x = raw.double().requires_grad_()
    z = x if cap is None else cap * torch.tanh(x / cap)
    return x, z.log_softmax(1).gather(1, targets[:, None])[:, 0]


def assert_close(found, exact, eps):
    assert found.isfinite().all()
    assert (found.double() - exact).abs().max() <= eps * exact.abs().max()


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", EPS)
def test_log_probs_and_gradient(dtype, vocabulary, cap):
    logits = raw_logits(67, vocabulary, dtype)
    raw, targets = logits.clone(), torch.randint(vocabulary, (67,), device=DEVICE)
    grad = torch.randn(67, device=DEVICE)
    x, exact = in_fp64(raw, targets, cap)
    (exact * grad.double()).sum().backward()
    logps, logsumexp = rows.rows_forward(logits, targets, 1.0, cap)
    again = rows.rows_forward(logits, targets, 1.0, cap)
    assert torch.equal(logps, again[0]) and torch.equal(logsumexp, again[1])
    assert_close(logps, exact.detach(), 1e-6)
    rows.rows_backward_(logits, targets, logsumexp, grad, 1.0, cap)
    assert_close(logits, x.grad, EPS[dtype])
    second = clone(raw)
    rows.rows_backward_(second, targets, logsumexp, grad, 1.0, cap)
    assert torch.equal(second, logits)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", EPS)
def test_npo(dtype, vocabulary):
    logits = raw_logits(67, vocabulary, dtype)
    raw, targets = logits.clone(), torch.randint(vocabulary, (67,), device=DEVICE)
    ref, weights = -torch.rand(67, device=DEVICE) * 20, torch.rand(67, device=DEVICE)
    x, exact = in_fp64(raw, targets, None)
    losses = -weights.double() * torch.nn.functional.logsigmoid(-0.1 * (exact - ref.double()))
    losses.sum().backward()
    found, logps = npo_rows_(logits, targets, ref, weights, 0.1, 1.0, None, -100)
    assert_close(found, losses.detach(), 1e-6)
    assert_close(logps, exact.detach(), 1e-6)
    assert_close(logits, x.grad, EPS[dtype])
    second = clone(raw)
    again, _ = npo_rows_(second, targets, ref, weights, 0.1, 1.0, None, -100)
    assert torch.equal(second, logits) and torch.equal(again, found)


@pytest.mark.xdist_group("large")
def test_more_than_2_to_the_31_logits():
    vocabulary, count = 151665, 14_300
    assert count * rows.padded_vocabulary(vocabulary, torch.bfloat16) > 2**31
    generator = torch.Generator(DEVICE).manual_seed(3)
    logits = rows.padded_logits(count, vocabulary, torch.bfloat16, DEVICE)
    logits.normal_(generator=generator)
    at = torch.tensor([0, 1, count // 2, count - 2, count - 1], device=DEVICE)
    targets = torch.randint(vocabulary, (count,), device=DEVICE)
    grad = torch.randn(count, device=DEVICE)
    raw = logits[at].clone()
    x, exact = in_fp64(raw, targets[at], None)
    (exact * grad[at].double()).sum().backward()
    logps, logsumexp = rows.rows_forward(logits, targets, 1.0, None)
    assert logps.isfinite().all()
    assert_close(logps[at], exact.detach(), 1e-6)
    rows.rows_backward_(logits, targets, logsumexp, grad, 1.0, None)
    assert_close(logits[at], x.grad, EPS[torch.bfloat16])
    logits[at] = raw
    ref, weights = torch.zeros(count, device=DEVICE), torch.ones(count, device=DEVICE)
    _, logps = npo_rows_(logits, targets, ref, weights, 0.1, 1.0, None, -100)
    assert_close(logps[at], exact.detach(), 1e-6)
