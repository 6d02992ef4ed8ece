import math

import pytest
import torch
import torch.nn.functional as F

from lit_align.losses import npo_loss, token_npo_losses, token_weighted_npo_loss


def test_sequence_npo_by_hand():
    same = torch.tensor([-5.0, -7.0])
    torch.testing.assert_close(npo_loss(same, same), torch.full((2,), 20 * math.log(2)))  # 13.863
    # Δ = 2, β = 0.5: (2/0.5)·ln(1 + e¹)
    found = npo_loss(torch.tensor([-1.0]), torch.tensor([-3.0]), beta=0.5)
    torch.testing.assert_close(found, torch.tensor([4 * math.log(1 + math.e)]))


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_sequence_npo_equals_its_other_form(beta):
    """(2/β)·log(1 + (π/π_ref)^β), eq. 3 of the paper."""
    policy, ref = (-5 * torch.rand(20, dtype=torch.float64) for _ in range(2))
    ratio = torch.exp(policy - ref)
    torch.testing.assert_close(npo_loss(policy, ref, beta), 2 / beta * torch.log(1 + ratio**beta))


def test_token_npo_by_hand():
    same = torch.tensor([-1.0, -2.0, -3.0])
    found = token_weighted_npo_loss(same, same, torch.tensor([1.0, 0.0, 0.5]))
    torch.testing.assert_close(found, torch.tensor(1.5 * math.log(2) / 2))  # 0.5199
    # Δ = 2, β = 0.5: ln(1 + e¹)
    losses = token_npo_losses(torch.tensor([-1.0]), torch.tensor([-3.0]), 0.5)
    torch.testing.assert_close(losses, torch.tensor([math.log(1 + math.e)]))


@pytest.mark.parametrize("shape", [(40,), (5, 8)])
def test_token_npo_divides_by_the_tokens_that_count_not_by_their_weights(shape):
    policy, ref, weights = (torch.rand(shape, dtype=torch.float64) for _ in range(3))
    weights[weights < 0.3] = 0
    total = sum(
        r * math.log(1 + math.exp(0.4 * (p - q)))
        for p, q, r in zip(*(t.flatten().tolist() for t in (policy, ref, weights)), strict=True)
    )
    expected = torch.tensor(total / int((weights != 0).sum()), dtype=torch.float64)
    torch.testing.assert_close(token_weighted_npo_loss(policy, ref, weights, 0.4), expected)


def test_all_weights_one_is_the_mean_over_tokens():
    policy, ref = torch.randn(30), torch.randn(30)
    found = token_weighted_npo_loss(policy, ref, torch.ones(30))
    torch.testing.assert_close(found, F.softplus(0.1 * (policy - ref)).mean())


def test_gradients():
    policy, ref = (torch.randn(12, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = torch.rand(12, dtype=torch.float64)
    weights[::3] = 0
    assert torch.autograd.gradcheck(lambda p, q: npo_loss(p, q, 0.6), (policy, ref))
    assert torch.autograd.gradcheck(lambda p, q: token_npo_losses(p, q, 0.6), (policy, ref))
    assert torch.autograd.gradcheck(
        lambda p, q, w: token_weighted_npo_loss(p, q, w, 0.6), (policy, ref, weights)
    )


def test_gradient_lowers_the_log_probs_and_fades_once_they_are_low():
    policy = torch.tensor([-1.0, -1000.0], requires_grad=True)
    npo_loss(policy, torch.tensor([-1.0, -1.0])).sum().backward()
    torch.testing.assert_close(policy.grad, torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("margin", [1e4, -1e4, 1e30, -1e30])
def test_large_margins_stay_finite(margin):
    policy, ref = torch.tensor([margin], requires_grad=True), torch.zeros(1)
    for loss, scale in (
        (npo_loss(policy, ref), 20),
        (token_weighted_npo_loss(policy, ref, torch.ones(1)), 1),
    ):
        expected = torch.tensor(max(0.0, scale * 0.1 * margin))
        torch.testing.assert_close(loss.sum(), expected, rtol=1e-3, atol=0)
        (gradient,) = torch.autograd.grad(loss.sum(), policy)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("odd", [-math.inf, math.nan])
@pytest.mark.parametrize("side", ["policy", "reference", "both"])
def test_a_token_of_weight_0_may_hold_anything(odd, side):
    policy, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.0])
    if side != "reference":
        policy[1] = odd
    if side != "policy":
        ref[1] = odd
    policy.requires_grad_()
    loss = token_weighted_npo_loss(policy, ref, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(loss, torch.tensor(math.log(2)))
    loss.backward()
    torch.testing.assert_close(policy.grad, torch.tensor([0.05, 0.0]))


def test_no_weight_at_all():
    policy = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss = token_weighted_npo_loss(policy, torch.zeros(2), torch.zeros(2))
    loss.backward()
    assert loss == 0
    assert policy.grad.tolist() == [0, 0]
    assert token_weighted_npo_loss(*(torch.empty(0) for _ in range(3))) == 0


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_beta_is_positive(beta):
    zeros = torch.zeros(2)
    for call in (npo_loss, token_npo_losses):
        with pytest.raises(ValueError, match="beta"):
            call(zeros, zeros, beta)
    with pytest.raises(ValueError, match="beta"):
        token_weighted_npo_loss(zeros, zeros, zeros, beta)
