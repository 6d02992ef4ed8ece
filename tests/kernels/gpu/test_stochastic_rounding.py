"""The rounding by itself, bit for bit as in torch."""

import pytest
import torch
import triton
import triton.language as tl

from lit_align_kernels.launch_tables import TRITON_TYPES
from lit_align_kernels.masked_adamw import rounding, stochastic_rounding

DEVICE = torch.device("cuda")
random_bits, round_stochastically = rounding.random_bits, rounding.round_stochastically


@triton.jit
def rounding_kernel(
    values_ptr, out_ptr, bits_ptr, seed, number, first, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bits = random_bits(seed, number, first + at.to(tl.int64))
    tl.store(bits_ptr + at, bits.to(tl.int64))
    values = round_stochastically(tl.load(values_ptr + at), bits, DTYPE)
    tl.store(out_ptr + at, values.to(DTYPE))


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_kind_of_number(dtype, seed):
    n = 1 << 20
    values = torch.randint(-(2**31), 2**31, (n,), device=DEVICE).int().view(torch.float32)
    values[: n // 2] = torch.randn(n // 2, device=DEVICE)
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, -1e-45, 65504.0, 65520.0, 3.4e38]
    values[: len(special)] = torch.tensor(special, device=DEVICE)
    out = torch.full((n,), torch.nan, dtype=dtype, device=DEVICE)
    bits = torch.empty(n, dtype=torch.int64, device=DEVICE)
    rounding_kernel[(n // 1024,)](
        values, out, bits, seed, 5, 0, DTYPE=TRITON_TYPES[dtype], BLOCK=1024
    )
    expected_bits = stochastic_rounding.random_bits(seed, 5, n, DEVICE)
    assert torch.equal(bits & 0xFFFFFFFF, expected_bits)
    expected = stochastic_rounding.round_stochastically(values, dtype, expected_bits)
    wrong = (out.view(torch.int16) != expected.view(torch.int16)) & ~values.isnan()
    assert not wrong.any(), values[wrong][:8]
    assert out[values.isnan()].isnan().all()
