"""Confidence intervals of a share."""

from __future__ import annotations

import math


def wilson_interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927); 95 % for z = 1.96.

    centre = (p + z²/2n) / (1 + z²/n), half width = z·√(p(1 - p)/n + z²/4n²) / (1 + z²/n).
    By hand, 8 of 100: p = 0.08, z²/n = 0.038416, centre = 0.099208 / 1.038416 = 0.095538,
    half width = 1.96·√(0.000736 + 0.00009604) / 1.038416 = 0.054444: (0.0411, 0.1500).

    Returns:
        (low, high) in [0, 1]; (0, 1) where n is 0.
    """
    if n == 0:
        return 0.0, 1.0
    share, spread = successes / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)
