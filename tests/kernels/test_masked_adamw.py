import math

import pytest
import torch

from lit_align_kernels.masked_adamw import AdamWEntry, masked_adamw_
from tests.kernels.cases import KINDS, KINDS_3D, entries_of, flat_order

SETTINGS = {"lr": 0.03, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.2}
CASES = [(kind, (11, 7)) for kind in KINDS] + [(kind, (3, 5, 7)) for kind in KINDS_3D]


def entry(master, weight=None, entries=None):
    zeros = torch.zeros_like(master)
    return AdamWEntry(master, zeros, zeros.clone(), zeros.clone(), torch.zeros(()), weight, entries)


def torch_adamw(parameter, settings=SETTINGS):
    betas = (settings["beta1"], settings["beta2"])
    rest = {name: settings[name] for name in ("lr", "eps", "weight_decay")}
    return torch.optim.AdamW([parameter], betas=betas, foreach=False, fused=False, **rest)


def test_first_step_by_hand():
    # m̂ = g and v̂ = g² at step 1, so θ moves by lr after decay: 2·(1 − 0.1·0.5) − 0.1 = 1.8
    one = entry(torch.tensor([2.0, 2.0]))
    one.grad = torch.tensor([3.0, -1e-3])
    masked_adamw_([one], lr=0.1, beta1=0.9, beta2=0.99, eps=0.0, weight_decay=0.5)
    torch.testing.assert_close(one.master, torch.tensor([1.8, 2.0]))
    torch.testing.assert_close(one.exp_avg, torch.tensor([0.3, -1e-4]))
    torch.testing.assert_close(one.exp_avg_sq, torch.tensor([0.09, 1e-8]))
    assert one.step == 1


@pytest.mark.parametrize("shape", [(), (9,), (11, 7), (3, 5, 7)])
def test_a_whole_parameter_follows_torch_adamw(shape):
    parameter = torch.nn.Parameter(torch.randn(shape))
    optimizer, ours = torch_adamw(parameter), entry(parameter.detach().clone())
    for _ in range(6):
        parameter.grad = torch.randn(shape)
        ours.grad = parameter.grad.clone()
        optimizer.step()
        masked_adamw_([ours], **SETTINGS)
        torch.testing.assert_close(ours.master, parameter.detach(), rtol=1e-6, atol=1e-6)
    state = optimizer.state[parameter]
    torch.testing.assert_close(ours.exp_avg, state["exp_avg"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.exp_avg_sq, state["exp_avg_sq"], rtol=1e-6, atol=1e-6)
    assert ours.step == state["step"] == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_selected_entries_follow_torch_adamw_and_reach_the_weight(kind, shape, dtype):
    weight, entries = torch.randn(shape).to(dtype), entries_of(kind, shape)
    before, at = weight.clone(), flat_order(entries)
    dense = torch.nn.Parameter(weight.float().clone())
    optimizer = torch_adamw(dense)
    ours = entry(weight.reshape(-1)[at].float(), weight, entries)
    for _ in range(4):
        dense.grad = torch.randn(shape)
        ours.grad = dense.grad.reshape(-1)[at]
        optimizer.step()
        masked_adamw_([ours], **SETTINGS)
    trained = dense.detach().reshape(-1)[at]
    torch.testing.assert_close(ours.master, trained, rtol=1e-6, atol=1e-6)
    expected = before.reshape(-1).clone()
    expected[at] = ours.master.to(dtype)  # every other entry bitwise as it was, decay included
    assert torch.equal(weight.reshape(-1), expected)


def test_masters_keep_updates_that_bf16_would_drop():
    weight = torch.ones(4, 4, dtype=torch.bfloat16)
    ours = entry(torch.ones(16), weight, entries_of("all", (4, 4)))
    ours.grad = torch.ones(16)
    settings = {**SETTINGS, "lr": 1e-3, "weight_decay": 0.0}  # half of bf16's step below 1 is 2e-3
    masked_adamw_([ours], **settings)
    assert (weight == 1).all()
    for _ in range(9):
        masked_adamw_([ours], **settings)
    torch.testing.assert_close(ours.master, torch.full((16,), 0.99), rtol=0, atol=1e-4)
    assert torch.equal(weight.view(-1), ours.master.bfloat16())


def test_parameters_of_one_batch_have_steps_of_their_own():
    first, second = entry(torch.ones(3)), entry(torch.ones(3))
    first.grad = second.grad = torch.tensor([1.0, -2.0, 0.5])
    masked_adamw_([first], **SETTINGS)
    alone = entry(torch.ones(3))
    alone.grad = first.grad
    for _ in range(2):
        masked_adamw_([alone], **SETTINGS)
    masked_adamw_([first, second], **SETTINGS)
    assert (first.step, second.step) == (2, 1)
    assert torch.equal(first.master, alone.master)
    assert not torch.equal(first.master, second.master)


@pytest.mark.parametrize("transposed", ["grad", "master"])
def test_layouts_may_differ(transposed):
    master, grad = torch.randn(5, 7), torch.randn(5, 7)
    plain, other = entry(master.clone()), entry(master.clone())
    plain.grad = other.grad = grad
    if transposed == "grad":
        other.grad = grad.t().contiguous().t()
    else:
        other = entry(master.t().contiguous().t())
        other.grad = grad
    masked_adamw_([plain], **SETTINGS)
    masked_adamw_([other], **SETTINGS)
    assert torch.equal(plain.master, other.master)


def test_nothing_to_do():
    masked_adamw_([], **SETTINGS)
    weight = torch.randn(11, 7)
    before = weight.clone()
    none = entry(torch.empty(0), weight, entries_of("elements, none", (11, 7)))
    masked_adamw_([none], **SETTINGS)
    assert torch.equal(weight, before)


def test_zero_gradients_leave_decay_alone():
    ours = entry(torch.full((3,), 2.0))
    for _ in range(5):
        masked_adamw_([ours], **SETTINGS)
    torch.testing.assert_close(ours.master, torch.full((3,), 2 * math.pow(1 - 0.03 * 0.2, 5)))


def test_a_scale_on_the_device_multiplies_the_gradients():
    plain, scaled = entry(torch.ones(5)), entry(torch.ones(5))
    plain.grad, scaled.grad = torch.linspace(-1, 1, 5), torch.linspace(-4, 4, 5)
    masked_adamw_([plain], **SETTINGS)
    masked_adamw_([scaled], **SETTINGS, grad_scale=torch.tensor(0.25))
    assert torch.equal(plain.master, scaled.master)
    assert torch.equal(plain.exp_avg_sq, scaled.exp_avg_sq)


def test_gradients_in_bf16():
    plain, small = entry(torch.ones(7)), entry(torch.ones(7))
    small.grad = torch.randn(7).bfloat16()
    plain.grad = small.grad.float()
    masked_adamw_([plain], **SETTINGS)
    masked_adamw_([small], **SETTINGS)
    assert torch.equal(plain.master, small.master)


def test_16_bit_masters_need_a_seed():
    with pytest.raises(TypeError, match="stochastically"):
        masked_adamw_([entry(torch.ones(3, dtype=torch.bfloat16))], **SETTINGS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_updates_below_a_step_of_16_bits_are_kept_on_average(dtype):
    # The step is 1e-4 below 1, a fortieth (bf16) or a fifth (fp16) of the grid's there.
    weight = torch.zeros(8, 8192, dtype=dtype)
    entries = entries_of("all", (8, 8192))
    ours = entry(torch.ones(8 * 8192, dtype=dtype), weight, entries)
    ours.exp_avg, ours.exp_avg_sq = torch.zeros(8 * 8192), torch.zeros(8 * 8192)
    ours.grad = torch.ones(8 * 8192)
    settings = {**SETTINGS, "lr": 1e-4, "weight_decay": 0.0}
    masked_adamw_([ours], **settings, stochastic_rounding_seed=7)
    step = 1 - float(torch.nextafter(torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype)))
    assert set(ours.master.double().unique().tolist()) == {1.0, 1.0 - step}
    deviation = (1e-4 * step) ** 0.5 / (8 * 8192) ** 0.5  # of the mean of Bernoulli steps
    assert abs(ours.master.double().mean() - (1 - 1e-4)) < 4 * deviation
    assert torch.equal(weight.view(-1), ours.master)


def many(count=3):
    """Entries of one batch, with gradients."""
    batch = [entry(torch.randn(12), torch.randn(4, 3), entries_of("all", (4, 3))) for _ in "abc"]
    for one in batch:
        one.grad = torch.randn(12)
    return batch[:count]


def test_what_is_noted_of_a_batch_does_not_outlast_its_tensors():
    """A step with the same tensors looks at them no more; any other is found out."""
    batch = many()
    masked_adamw_(batch, **SETTINGS)
    noted = batch[0].noted
    for one in batch:
        one.grad = torch.randn(12)
    masked_adamw_(batch, **SETTINGS)
    assert batch[0].noted is noted and noted.holds(batch, False)
    assert not noted.holds(batch, True) and not noted.holds(batch[:2], False)
    for name, value in (
        ("grad", torch.randn(12, dtype=torch.float64)),
        ("grad", torch.randn(13)),
        ("exp_avg", torch.zeros(12, dtype=torch.bfloat16)),
        ("step", torch.zeros(1)),
        ("weight", torch.randn(3, 4)),
        ("entries", entries_of("all", (3, 4))),
    ):
        before = getattr(batch[2], name)
        setattr(batch[2], name, value)
        with pytest.raises((TypeError, ValueError)):
            masked_adamw_(batch, **SETTINGS)
        setattr(batch[2], name, before)
    masked_adamw_(batch, **SETTINGS)
    batch[1].weight.data = torch.randn(4, 3)
    assert not batch[0].noted.holds(batch, False)


@pytest.mark.parametrize(
    "view",
    [
        lambda weight: weight[:2],
        lambda weight: weight.view(torch.bfloat16)[:, :3],
        lambda weight: weight.view(3, 4).t(),
    ],
)
def test_another_view_of_the_same_memory_is_found_out(view):
    batch = many()
    masked_adamw_(batch, **SETTINGS)
    batch[1].weight.data = view(batch[1].weight.data)
    with pytest.raises(ValueError, match="number 1"):
        masked_adamw_(batch, **SETTINGS)


def test_gradients_of_other_layouts_are_looked_at_in_every_step():
    batch = many()
    batch[1].grad = torch.randn(24)[::2]
    masked_adamw_(batch, **SETTINGS)
    assert batch[0].noted is None
