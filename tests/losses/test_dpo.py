import math

import pytest
import torch
import torch.nn.functional as F

from lit_align.losses import dpo_loss

SMOOTHED = [
    ("sigmoid", 0.0),
    ("sigmoid", 0.2),
    ("robust", 0.0),
    ("robust", 0.2),
    ("hinge", 0.0),
    ("ipo", 0.0),
]


def random_logps(batch=32, scale=20.0, dtype=torch.float64):
    return tuple(-scale * torch.rand(batch, dtype=dtype) for _ in range(4))


@pytest.mark.parametrize(
    ("loss_type", "smoothing", "expected"),
    [
        ("sigmoid", 0.0, math.log(1 + math.exp(-1))),  # 0.3133: βh = 0.5 · 2 = 1
        ("sigmoid", 0.1, 0.9 * math.log(1 + math.exp(-1)) + 0.1 * math.log(1 + math.exp(1))),
        ("robust", 0.0, math.log(1 + math.exp(-1))),
        ("robust", 0.1, (0.9 * 0.31326169 - 0.1 * 1.31326169) / 0.8),
        ("hinge", 0.0, 0.0),
        ("ipo", 0.0, 1.0),  # (2 − 1)²
    ],
)
def test_by_hand(loss_type, smoothing, expected):
    logps = [torch.tensor([value]) for value in (-1.0, -3.0, -2.0, -2.0)]
    losses, chosen, rejected = dpo_loss(
        *logps, beta=0.5, label_smoothing=smoothing, loss_type=loss_type
    )
    torch.testing.assert_close(losses, torch.tensor([expected]))
    assert (chosen.item(), rejected.item()) == (0.5, -0.5)


def test_hinge_and_ipo_away_from_their_minimum_by_hand():
    logps = [torch.tensor([value]) for value in (-3.0, -1.0, -2.0, -2.0)]  # h = −2
    assert dpo_loss(*logps, beta=0.5, loss_type="hinge")[0].item() == 2.0
    assert dpo_loss(*logps, beta=0.5, loss_type="ipo")[0].item() == 9.0


def test_policy_equal_to_the_reference_by_hand():
    same = torch.tensor([-5.0, -7.0])
    losses, chosen, rejected = dpo_loss(same, same - 1, same, same - 1)
    torch.testing.assert_close(losses, torch.full((2,), math.log(2)))
    assert (chosen == 0).all() and (rejected == 0).all()


def trl_losses(policy_c, policy_r, ref_c, ref_r, beta, smoothing, loss_type):
    """The branches of TRL's DPOTrainer, from log-ratios of policy and reference."""
    delta = (policy_c - policy_r) - (ref_c - ref_r)
    if loss_type == "sigmoid":
        return (
            -F.logsigmoid(beta * delta) * (1 - smoothing) - F.logsigmoid(-beta * delta) * smoothing
        )
    if loss_type == "robust":
        clean = -F.logsigmoid(beta * delta) * (1 - smoothing)
        flipped = -F.logsigmoid(-beta * delta) * smoothing
        return (clean - flipped) / (1 - 2 * smoothing)
    if loss_type == "hinge":
        return torch.relu(1 - beta * delta)
    return (delta - 1 / (2 * beta)) ** 2


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.7])
@pytest.mark.parametrize(("loss_type", "smoothing"), SMOOTHED)
def test_trl_formulae(loss_type, smoothing, beta):
    logps = random_logps()
    losses, chosen, rejected = dpo_loss(*logps, beta, smoothing, loss_type)
    torch.testing.assert_close(losses, trl_losses(*logps, beta, smoothing, loss_type))
    torch.testing.assert_close(chosen, beta * (logps[0] - logps[2]))
    torch.testing.assert_close(rejected, beta * (logps[1] - logps[3]))
    assert losses.shape == chosen.shape == rejected.shape == (32,)


def test_smoothed_losses_are_those_of_flipped_labels():
    c, r, ref_c, ref_r = random_logps()
    right = dpo_loss(c, r, ref_c, ref_r)[0]
    wrong = dpo_loss(r, c, ref_r, ref_c)[0]
    smoothed = dpo_loss(c, r, ref_c, ref_r, label_smoothing=0.3)[0]
    torch.testing.assert_close(smoothed, 0.7 * right + 0.3 * wrong)
    robust_right = dpo_loss(c, r, ref_c, ref_r, label_smoothing=0.3, loss_type="robust")[0]
    robust_wrong = dpo_loss(r, c, ref_r, ref_c, label_smoothing=0.3, loss_type="robust")[0]
    # unbiased: with 30 % of the labels flipped its mean is the loss of the right ones
    torch.testing.assert_close(0.7 * robust_right + 0.3 * robust_wrong, right)


@pytest.mark.parametrize(("loss_type", "smoothing"), SMOOTHED)
def test_gradients(loss_type, smoothing):
    policy = [t.requires_grad_() for t in random_logps(6, scale=3.0)]
    assert torch.autograd.gradcheck(
        lambda *logps: dpo_loss(*logps, 0.6, smoothing, loss_type)[0], policy
    )


def test_rewards_are_detached():
    logps = [t.requires_grad_() for t in random_logps()]
    losses, chosen, rejected = dpo_loss(*logps)
    assert losses.requires_grad
    assert not chosen.requires_grad
    assert not rejected.requires_grad


@pytest.mark.parametrize("margin", [1e4, -1e4, 1e30, -1e30])
@pytest.mark.parametrize(
    ("loss_type", "smoothing"),
    [("sigmoid", 0.0), ("sigmoid", 0.1), ("robust", 0.1), ("hinge", 0.0)],
)
def test_large_margins_stay_finite(loss_type, smoothing, margin):
    chosen = torch.tensor([margin], requires_grad=True)
    zero = torch.zeros(1)
    losses = dpo_loss(chosen, zero, zero, zero, 0.1, smoothing, loss_type)[0]
    losses.sum().backward()
    assert losses.isfinite().all()
    assert chosen.grad.isfinite().all()
    if not smoothing:  # linear where the pair is wrong, nothing where it is right
        torch.testing.assert_close(losses.item(), max(0.0, -0.1 * margin), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta 0.0"),
        ({"beta": -1.0}, "beta -1.0"),
        ({"label_smoothing": 0.5}, "label_smoothing 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing -0.1"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "hinge has no label smoothing"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "ipo has no label smoothing"),
        ({"loss_type": "simpo"}, "loss_type 'simpo'"),
    ],
)
def test_settings_out_of_range_are_an_error(settings, message):
    with pytest.raises(ValueError, match=message):
        dpo_loss(*random_logps(), **settings)
