import math

import pytest
import torch

from lit_align.losses import sequence_lengths, sequence_logps

INDEX = torch.tensor([0, 0, 2, 2, 2])  # sequence 1 has no target


def test_by_hand():
    logps = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0])
    assert sequence_logps(logps, INDEX, 4).tolist() == [-3, 0, -28, 0]
    weights = torch.tensor([1.0, 0.0, 0.5, -1.0, 2.0])
    assert sequence_logps(logps, INDEX, 4, weights).tolist() == [-1, 0, -26, 0]
    assert sequence_lengths(INDEX, 4).tolist() == [2, 0, 3, 0]


def test_against_a_loop_over_sequences():
    index = torch.randint(0, 9, (200,)).sort().values
    logps, weights = -torch.rand(200).double(), torch.rand(200).double()
    expected = torch.stack([(logps * weights)[index == s].sum() for s in range(9)])
    torch.testing.assert_close(sequence_logps(logps, index, 9, weights), expected)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_sums_are_at_least_fp32(given, found):
    ones = torch.ones(5, dtype=given)
    assert sequence_logps(ones, INDEX, 3).dtype == found
    assert sequence_logps(ones, INDEX, 3, ones.float()).dtype == found
    many = torch.ones(1000, dtype=given)
    assert sequence_logps(many, torch.zeros(1000, dtype=torch.int64), 1).item() == 1000


def test_gradients():
    logps = torch.randn(5, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 0.0, 0.5, -1.0, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: sequence_logps(x, INDEX, 3), logps)
    assert torch.autograd.gradcheck(lambda x: sequence_logps(x, INDEX, 3, weights), logps)


@pytest.mark.parametrize("odd", [-math.inf, math.nan])
def test_a_token_of_weight_0_may_hold_anything(odd):
    logps = torch.tensor([-1.0, odd, -4.0, -8.0, -16.0], requires_grad=True)
    sums = sequence_logps(logps, INDEX, 3, torch.tensor([1.0, 0, 1, 1, 1]))
    assert sums.tolist() == [-1, 0, -28]
    sums.sum().backward()
    assert logps.grad.tolist() == [1, 0, 1, 1, 1]


def test_no_targets():
    nothing = torch.empty(0)
    index = torch.empty(0, dtype=torch.int64)
    assert sequence_logps(nothing, index, 2, nothing).tolist() == [0, 0]
    assert sequence_lengths(index, 2).tolist() == [0, 0]
