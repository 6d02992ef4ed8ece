import pytest

from lit_align.evaluation import wilson_interval


def test_by_hand_and_at_the_ends():
    assert wilson_interval(8, 100) == pytest.approx((0.0411, 0.1500), abs=5e-5)
    low, high = wilson_interval(0, 10)
    assert low == 0.0 and high == pytest.approx(0.2775, abs=5e-5)  # z²/(n + z²)
    assert wilson_interval(10, 10) == pytest.approx((1 - high, 1.0))
    assert wilson_interval(0, 0) == (0.0, 1.0)
