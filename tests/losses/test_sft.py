import math

import pytest
import torch
import torch.nn.functional as F

from lit_align.losses import sft_loss


def test_by_hand():
    logps = torch.tensor([-1.0, -3.0])
    assert sft_loss(logps) == 2
    assert sft_loss(logps, torch.tensor([1.0, 0.0])) == 1
    assert sft_loss(logps, torch.tensor([0.5, 1.5])) == 2.5


def test_equals_cross_entropy():
    logits, labels = torch.randn(20, 11, dtype=torch.float64), torch.randint(0, 11, (20,))
    labels[::4] = -100
    logps = logits.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    expected = F.cross_entropy(logits, labels)
    torch.testing.assert_close(sft_loss(logps, (labels != -100).double()), expected)
    torch.testing.assert_close(sft_loss(logps[labels != -100]), expected)


def test_gradients():
    logps = torch.randn(8, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1, 0, 0.5, 2, 0, 1, 1, 0.1], dtype=torch.float64)
    assert torch.autograd.gradcheck(sft_loss, logps)
    assert torch.autograd.gradcheck(lambda x: sft_loss(x, weights), logps)


@pytest.mark.parametrize("odd", [-math.inf, math.nan])
def test_a_token_of_weight_0_may_hold_anything(odd):
    logps = torch.tensor([-1.0, odd, -3.0], requires_grad=True)
    loss = sft_loss(logps, torch.tensor([1.0, 0.0, 1.0]))
    loss.backward()
    assert loss == 2
    assert logps.grad.tolist() == [-0.5, 0, -0.5]


def test_nothing_to_learn():
    logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss = sft_loss(logps, torch.zeros(2))
    loss.backward()
    assert loss == 0
    assert logps.grad.tolist() == [0, 0]
    assert sft_loss(torch.empty(0)) == 0
    assert sft_loss(torch.empty(0), torch.empty(0)) == 0
