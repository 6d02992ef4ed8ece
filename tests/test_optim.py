"""MaskedAdamW as an optimiser: settings, closures, groups, state; its steps: tests/compact."""

import copy

import pytest
import torch
from torch import nn

from lit_align.compact import links, restrict, sync
from lit_align.optim import MaskedAdamW
from lit_align_kernels.swap_selected import gather_entries
from tests.compact.test_restrict import compact_steps, make_mask, trainable
from tests.tiny_models import tiny_model


@pytest.mark.parametrize(
    "settings",
    [{"lr": -1}, {"eps": -1e-8}, {"weight_decay": -0.1}, {"betas": (1, 0.9)}, {"betas": (0, 1)}],
)
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match="out of range"):
        MaskedAdamW([nn.Parameter(torch.zeros(2))], **settings)


def test_only_fp32_trains():
    with pytest.raises(TypeError, match="restrict"):
        MaskedAdamW([nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))])


def test_the_closure_runs_first_and_its_loss_comes_back():
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = MaskedAdamW([parameter], lr=0.1, weight_decay=0.0)

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) == 5.0
    torch.testing.assert_close(parameter.detach(), torch.tensor([0.9, -1.9]))


def test_groups_have_their_own_settings():
    still, moving = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = MaskedAdamW([{"params": [still], "lr": 0.0}, {"params": [moving]}], lr=0.5)
    still.grad, moving.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    assert torch.equal(still, torch.ones(3)) and (moving < 1).all()


def test_a_parameter_without_gradient_is_left_alone():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = MaskedAdamW([parameter], lr=0.5, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(parameter, torch.ones(3)) and not optimizer.state


def test_going_on_from_a_state_dict_is_exact():
    model = restrict(tiny_model(), make_mask(tiny_model()))
    optimizer = MaskedAdamW(trainable(model), lr=1e-2)
    compact_steps(model, 2, optimizer)
    twin = copy.deepcopy(model)
    again = MaskedAdamW(trainable(twin), lr=1.0)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    compact_steps(model, 2, optimizer)
    compact_steps(twin, 2, again)
    for (name, a), (_, b) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_scale_on_the_gradients_holds_for_one_step():
    plain, scaled = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    one, other = MaskedAdamW([plain], lr=0.1), MaskedAdamW([scaled], lr=0.1)
    for factor in (4.0, 1.0):
        plain.grad = torch.tensor([1.0, -2.0, 0.5])
        scaled.grad = plain.grad * factor
        other.grad_scale = torch.tensor(1 / factor) if factor != 1 else None
        one.step()
        other.step()
        assert other.grad_scale is None
    assert torch.equal(plain, scaled)


def without_masters(seed=0):
    model = restrict(tiny_model().bfloat16(), make_mask(tiny_model()), masters=False)
    return model, MaskedAdamW(trainable(model), lr=1e-3, stochastic_rounding=True, seed=seed)


def test_weights_without_masters_train_by_stochastic_rounding():
    model, optimizer = without_masters()
    assert {p.dtype for p in trainable(model)} == {torch.bfloat16}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    compact_steps(model, 3, optimizer)
    moved = total = 0
    for link in links(model):
        assert torch.equal(gather_entries(link.weight, link.state.entries), link.selected.view(-1))
        moved += int((link.selected != before[name_of(model, link.selected)]).sum())
        total += link.selected.numel()
    assert moved > total / 4  # a few have large steps of bf16's grid to go
    assert {v["exp_avg"].dtype for v in optimizer.state.values()} == {torch.float32}
    other, other_optimizer = without_masters(seed=1)
    compact_steps(other, 3, other_optimizer)
    pairs = zip(trainable(model), trainable(other), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


def name_of(model, parameter):
    return next(n for n, p in model.named_parameters() if p is parameter)


def test_stochastic_rounding_goes_on_exactly_from_a_state_dict():
    model, optimizer = without_masters()
    compact_steps(model, 2, optimizer)
    again, again_optimizer = without_masters()
    for target, source in zip(trainable(again), trainable(model), strict=True):
        target.data.copy_(source)
    sync(again)
    again_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    compact_steps(model, 2, optimizer)
    compact_steps(again, 2, again_optimizer)
    for one, other in zip(trainable(model), trainable(again), strict=True):
        assert torch.equal(one, other)


def test_restored_state_stands_on_the_parameters_device():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = MaskedAdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    elsewhere = nn.Parameter(torch.ones(3, device="meta"))
    restored = MaskedAdamW([elsewhere])
    restored.load_state_dict(optimizer.state_dict())
    assert {t.device.type for t in restored.state[elsewhere].values()} == {"meta"}
    assert {t.dtype for t in restored.state[elsewhere].values()} == {torch.float32}


def test_a_step_count_left_on_another_device_follows_its_parameter():
    parameter = nn.Parameter(torch.ones(3, device="meta"))
    parameter.grad = torch.ones(3, device="meta")
    optimizer = MaskedAdamW([parameter])
    optimizer._links = {}
    optimizer._entry(parameter)
    optimizer.state[parameter]["step"] = torch.tensor(3.0)
    assert optimizer._entry(parameter).step.device.type == "meta"


def test_copies_step_on():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = copy.deepcopy(MaskedAdamW([parameter], lr=0.5))
    copied = optimizer.param_groups[0]["params"][0]
    copied.grad = torch.ones(3)
    optimizer.step()
    assert (copied < 1).all()


def test_how_a_run_rounds_is_its_own_setting():
    exact = MaskedAdamW([nn.Parameter(torch.ones(3))])
    exact.param_groups[0]["params"][0].grad = torch.ones(3)
    exact.step()
    small = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    rounding = MaskedAdamW([small], stochastic_rounding=True, seed=4)
    rounding.load_state_dict(exact.state_dict())
    group = rounding.param_groups[0]
    assert (group["stochastic_rounding"], group["seed"], group["rounds"]) == (True, 4, 1)
    small.grad = torch.ones(3, dtype=torch.bfloat16)
    rounding.step()
