"""Stochastic rounding to 16 bits in Triton: bit for bit what `stochastic_rounding.py` defines."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lit_align_kernels.masked_adamw.stochastic_rounding import LOWEST_EXPONENT, MANTISSA_BITS

BITS_BF16 = tl.constexpr(MANTISSA_BITS[torch.bfloat16])
BITS_FP16 = tl.constexpr(MANTISSA_BITS[torch.float16])
LOWEST_BF16 = tl.constexpr(LOWEST_EXPONENT[torch.bfloat16])
LOWEST_FP16 = tl.constexpr(LOWEST_EXPONENT[torch.float16])


@triton.jit
def random_bits(seed, number, entry):
    """32 random bits for every `entry` (int64) of parameter `number`: uint32."""
    low, high = entry.to(tl.int32), (entry >> 32).to(tl.int32)
    zero = tl.zeros_like(low)
    bits, _, _, _ = tl.philox(seed, low, high, zero + number.to(tl.int32), zero)
    return bits.to(tl.uint32, bitcast=True)


@triton.jit
def round_stochastically(value, bits, dtype: tl.constexpr):
    """fp32 values up or down to ones that `dtype`, bf16 or fp16, holds; still in fp32."""
    MANTISSA: tl.constexpr = BITS_BF16 if dtype == tl.bfloat16 else BITS_FP16
    LOWEST: tl.constexpr = LOWEST_BF16 if dtype == tl.bfloat16 else LOWEST_FP16
    exponent = (value.to(tl.int32, bitcast=True) >> 23) & 0xFF
    power = tl.maximum(exponent, LOWEST) - MANTISSA
    step = (power << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - power) << 23).to(tl.float32, bitcast=True)
    steps = value * inverse  # a power of two: exact
    below = tl.floor(steps)
    uniform = (bits >> 8).to(tl.float32) * (1.0 / (1 << 24))
    up = tl.where(uniform < steps - below, 1.0, 0.0)
    return tl.where(exponent < 255, (below + up) * step, value)
