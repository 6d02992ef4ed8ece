import pytest
import torch

from lit_align_kernels.masked_adamw.stochastic_rounding import random_bits, round_stochastically

DTYPES = [torch.bfloat16, torch.float16]


def test_philox_of_the_known_answers():
    # Random123's kat_vectors: philox4x32-10 of counter 0 and key 0 starts with 6627e8d5.
    assert hex(random_bits(0, 0, 1, torch.device("cpu"))[0]) == "0x6627e8d5"


def test_bits_depend_on_seed_parameter_and_entry_alone():
    cpu = torch.device("cpu")
    bits = random_bits(3, 1, 1000, cpu)
    assert torch.equal(bits[:10], random_bits(3, 1, 10, cpu))
    for other in (random_bits(4, 1, 1000, cpu), random_bits(3, 2, 1000, cpu)):
        assert not (other == bits).any()
    assert bits.min() >= 0 and bits.max() < 2**32
    assert abs(bits.double().mean() / 2**32 - 0.5) < 0.05


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_fits_stays(dtype):
    values = torch.tensor([0.0, 1.0, -1.5, 2.0**-14, 2.0**-24, -(2.0**10), 3.0, float("inf")])
    values = torch.cat([values, torch.tensor([float("nan"), -float("inf")])])
    for bits in (0, 2**32 - 1, 12345678):
        rounded = round_stochastically(values, dtype, torch.full((10,), bits))
        torch.testing.assert_close(rounded.float(), values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [1.0001, -1.0001, 3e-6, -7e-8, 2e-8, 65503.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_and_their_mean(dtype, value):
    count = 1 << 16
    values = torch.full((count,), value)
    bits = random_bits(1, 2, count, torch.device("cpu"))
    rounded = round_stochastically(values, dtype, bits).double()
    near = values[:1].to(dtype)
    candidates = [
        near.double(),
        torch.nextafter(near, torch.full_like(near, torch.inf)).double(),
        torch.nextafter(near, torch.full_like(near, -torch.inf)).double(),
    ]
    assert set(rounded.unique().tolist()) <= {float(c) for c in candidates}
    spacing = float(candidates[1] - candidates[2])
    assert abs(float(rounded.mean()) - float(values[0].double())) < 4 * spacing / count**0.5
