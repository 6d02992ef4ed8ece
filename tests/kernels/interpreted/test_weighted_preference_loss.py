"""Token NPO over rows of logits in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

from lit_align_kernels.audit.interpreter import interpreted
from lit_align_kernels.audit.traffic import traffic
from lit_align_kernels.token_logprobs.kernel import padded_logits
from lit_align_kernels.weighted_preference_loss import audit
from lit_align_kernels.weighted_preference_loss.kernel import npo_rows_

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = {torch.float32: 2e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}


def raw_logits(rows, vocabulary, dtype, padded=True):
    generator = torch.Generator().manual_seed(vocabulary)
    values = 3.0 * torch.randn(rows, vocabulary, generator=generator)
    if not padded:
        return values.to(dtype)
    return padded_logits(rows, vocabulary, dtype, torch.device("cpu")).copy_(values)


def torch_npo(raw, targets, ref_logps, weights, beta, scale, cap, dtype):
    """Losses, log-probs and the gradient of the sum of the losses by autograd in `dtype`."""
    x = raw.to(dtype, copy=True).requires_grad_()
    z = x * scale
    z = z if cap is None else cap * torch.tanh(z / cap)
    logps = z.log_softmax(1).gather(1, targets[:, None])[:, 0]
    losses = weights.to(dtype) * -F.logsigmoid(-beta * (logps - ref_logps.to(dtype)))
    losses.sum().backward()
    return losses.detach(), logps.detach(), x.grad


def assert_within_budget(got, exact, same_dtype, eps):
    budget = 2 * (same_dtype.double() - exact).abs() + eps * exact.abs().max()
    error = (got.double() - exact).abs()
    assert (error <= budget).all(), (error - budget).max().item()


def run(logits, targets, ref_logps, weights, beta=0.1, scale=1.0, cap=None):
    with interpreted(), traffic():  # which raises where something stray is touched
        losses, logps = npo_rows_(logits, targets, ref_logps, weights, beta, scale, cap, -100)
    return losses, logps, logits


def check(logits, targets, ref_logps, weights, beta=0.1, scale=1.0, cap=None):
    raw, dtype = logits.clone(), logits.dtype
    exact = torch_npo(raw, targets, ref_logps, weights, beta, scale, cap, torch.float64)
    single = torch_npo(raw.float(), targets, ref_logps, weights, beta, scale, cap, torch.float32)
    losses, logps, d_logits = run(logits, targets, ref_logps, weights, beta, scale, cap)
    assert losses.dtype == logps.dtype == torch.float32
    assert_within_budget(losses, exact[0], single[0], 1e-6)
    assert_within_budget(logps, exact[1], single[1], 1e-6)
    assert_within_budget(d_logits, exact[2], single[2].to(dtype), EPS[dtype])


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("vocabulary", [507, 512, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, vocabulary, padded):
    logits = raw_logits(4, vocabulary, dtype, padded)
    ref_logps = torch.tensor([-8.0, -3.0, -20.0, -0.5])
    weights = torch.tensor([1.0, 0.5, -0.25, 2.0])
    check(logits, torch.tensor([0, 77, 300, vocabulary - 1]), ref_logps, weights)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_row(dtype):
    logits = raw_logits(1, 50257, dtype)
    check(logits, torch.tensor([50256]), torch.tensor([-9.0]), torch.ones(1))


@pytest.mark.parametrize(
    ("beta", "scale", "cap"), [(1.0, 0.5, None), (0.1, 1.0, 30.0), (10.0, -2.0, 5.0)]
)
def test_beta_scale_and_soft_cap(beta, scale, cap):
    logits = raw_logits(3, 1000, torch.float32)
    targets, ref_logps = torch.tensor([1, 2, 3]), torch.tensor([-5.0, -7.0, -9.0])
    check(logits, targets, ref_logps, torch.ones(3), beta, scale, cap)


def test_by_hand():
    """At policy = reference = uniform: ln 2 each, and a gradient of w·β/2·(onehot - 1/V)."""
    logits = torch.zeros(2, 16)
    uniform = torch.full((2,), -(torch.tensor(16.0)).log())
    losses, logps, d_logits = run(
        logits, torch.tensor([3, 0]), uniform, torch.tensor([1.0, 0.5]), beta=0.2
    )
    torch.testing.assert_close(losses, torch.tensor([1.0, 0.5]) * torch.tensor(2.0).log())
    torch.testing.assert_close(logps, uniform)
    onehot = torch.zeros(2, 16)
    onehot[0, 3] = onehot[1, 0] = 1.0
    torch.testing.assert_close(d_logits, torch.tensor([[0.1], [0.05]]) * (onehot - 1 / 16))


@pytest.mark.parametrize("ref", [-1e4, 1e4])
def test_log_ratios_far_from_zero_keep_their_accuracy(ref):
    """The loss of a tiny odds ratio is that ratio, not 0; that of a large one does not overflow."""
    logits = raw_logits(2, 507, torch.float32)
    ref_logps = torch.tensor([ref, 160.0])
    losses, _, d_logits = run(logits.clone(), torch.tensor([5, 6]), ref_logps, torch.ones(2))
    exact = torch_npo(
        logits, torch.tensor([5, 6]), ref_logps, torch.ones(2), 0.1, 1.0, None, torch.float64
    )
    torch.testing.assert_close(losses.double(), exact[0], rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(d_logits.double(), exact[2], rtol=1e-4, atol=1e-12)


def test_ignored_tokens_are_zero_and_unread():
    logits = raw_logits(3, 507, torch.bfloat16)
    logits[1] = torch.nan
    targets = torch.tensor([5, -100, 7])
    ref_logps, weights = torch.tensor([-5.0, torch.nan, -5.0]), torch.ones(3)
    with interpreted(), traffic() as seen:
        losses, logps = npo_rows_(logits, targets, ref_logps, weights, 0.1, 1.0, None, -100)
    assert losses[1] == logps[1] == 0 and (logits[1] == 0).all()
    assert losses[[0, 2]].gt(0).all() and logits.isfinite().all()
    (launch,) = seen.launches
    assert launch.tensors["logits_ptr"].loaded == 2 * 2 * (2 * 507 + 1)


def test_a_weight_of_zero_gives_zero_whatever_the_log_probs_are():
    logits = raw_logits(4, 507, torch.float32)
    raw = logits.clone()
    logits[1, 5] = raw[1, 5] = -torch.inf
    logits[2] = raw[2] = torch.nan
    targets = torch.tensor([5, 5, 5, 507])
    ref_logps = torch.tensor([-torch.inf, -3.0, -3.0, torch.nan])
    losses, logps, d_logits = run(logits, targets, ref_logps, torch.zeros(4))
    assert (losses == 0).all() and (d_logits == 0).all()
    expected = raw.double().log_softmax(1)[[0, 1, 2], [5, 5, 5]]
    torch.testing.assert_close(logps[:3].double(), expected, equal_nan=True, rtol=1e-6, atol=1e-6)
    assert logps[3].isnan()


def test_stray_targets_are_nan():
    logits = raw_logits(3, 507, torch.float32)
    losses, logps, _ = run(
        logits, torch.tensor([507, -1, 3]), torch.full((3,), -5.0), torch.ones(3)
    )
    assert losses.isnan().tolist() == logps.isnan().tolist() == [True, True, False]


def test_no_rows():
    none = torch.empty(0)
    losses, logps, _ = run(
        raw_logits(0, 507, torch.float32), torch.empty(0, dtype=torch.int64), none, none
    )
    assert losses.shape == logps.shape == (0,)


@pytest.mark.parametrize("case", audit.traffic_cases(), ids=lambda case: case.name)
def test_traffic_is_two_reads_of_each_row_and_one_write(case):
    with interpreted(), traffic(tensors=case.tensors) as seen:
        case.call()
    assert seen.out_of_bounds == 0 and seen.races == 0
    assert seen.unique == case.minimum_bytes
    (launch,) = seen.launches
    logits = launch.tensors["logits_ptr"]
    itself = 3 * 4  # at most: the logit of each row's target is read apart
    assert 2 * logits.stored <= logits.loaded <= 2 * logits.stored + itself
