"""Stochastic rounding with random numbers that a counter gives. Plain torch.

A value between two neighbours of the smaller type becomes the upper one with the probability of its
distance from the lower one, so that its mean is the value itself: updates smaller than half a step
of bf16 are kept on average. The random bits are Philox-4x32-10 (Salmon et al. 2011, Parallel Random
Numbers: As Easy as 1, 2, 3) of seed, parameter and entry alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOW = 0xFFFFFFFF
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
ROUNDS = 10
MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}
# fp32's biased exponent below which the grid no longer gets finer: that of fp16's smallest normal,
# 2⁻¹⁴; for bf16 the lowest one at which the step is still a normal fp32 number.
LOWEST_EXPONENT = {torch.bfloat16: 8, torch.float16: 113}


def random_bits(seed: int, number: int, count: int, device: torch.device) -> Tensor:
    """(count,) int64 in [0, 2³²): the bits for entries 0 … count − 1 of parameter `number`.

    The counter is (entry mod 2³², entry div 2³², number, 0) and the key the seed's two words.
    """
    entry = torch.arange(count, device=device)
    counter = [entry & LOW, entry >> 32, torch.full_like(entry, number), torch.zeros_like(entry)]
    key = [seed & LOW, (seed >> 32) & LOW]
    for _ in range(ROUNDS):
        high0, low0 = _multiply(counter[0], MULTIPLIERS[0])
        high1, low1 = _multiply(counter[2], MULTIPLIERS[1])
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(k + step) & LOW for k, step in zip(key, KEY_STEPS, strict=True)]
    return counter[0]


def _multiply(values: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of 32-bit numbers, kept in int64."""
    low, high = values * (factor & 0xFFFF), values * (factor >> 16)  # each below 2⁴⁸
    total = low + ((high & 0xFFFF) << 16)
    return ((high >> 16) + (total >> 32)) & LOW, total & LOW


def round_stochastically(values: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """fp32 `values` in bf16 or fp16, up or down by `bits` (int64 in [0, 2³²), same shape).

    A value that `dtype` holds exactly stays, and so do infinities and NaN.
    """
    exponent = ((values.view(torch.int32) >> 23) & 0xFF).clamp(min=LOWEST_EXPONENT[dtype])
    power = exponent - MANTISSA_BITS[dtype]
    step, inverse = (power << 23).view(torch.float32), ((254 - power) << 23).view(torch.float32)
    steps = values * inverse  # powers of two: exact
    below = steps.floor()
    uniform = (bits >> 8).float() * 2.0**-24
    rounded = (below + (uniform < steps - below).float()) * step
    return torch.where(values.isfinite(), rounded, values).to(dtype)
