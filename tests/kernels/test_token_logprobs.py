import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lit_align_kernels.token_logprobs as token_logprobs_module
from lit_align_kernels.token_logprobs import (
    WeightHandle,
    token_logprobs,
    token_logprobs_with_statistics,
)
from tests.kernels.cases import KINDS, entries_of, flat_order

DTYPES = [torch.float32, torch.bfloat16]
SETTINGS = [
    {},
    {"logit_scale": 0.35},
    {"soft_cap": 2.5},
    {"logit_scale": 1.7, "soft_cap": 3.0},
]


@dataclass
class Inputs:
    """hidden (N, D), weight (V, D), bias (V,), targets (N,), and the gradient that arrives (N,)."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor
    upstream: torch.Tensor

    def cast(self, dtype):
        """Fresh leaves, all of one dtype."""
        parts = (self.hidden, self.weight, self.bias)
        leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in parts]
        return Inputs(*leaves, self.targets, self.upstream)


def inputs_of(n, d, v, dtype=torch.float32, *, bias=False):
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    hidden, weight = normal(n, d).to(dtype), (2 * normal(v, d) / math.sqrt(d)).to(dtype)
    targets = torch.randint(0, v, (n,), generator=generator)
    if n:
        targets[0], targets[-1] = 0, v - 1
    made = normal(v).to(dtype) if bias else None
    return Inputs(hidden, weight, made, targets, normal(n))


def dense_logits(x, logit_scale=1.0, soft_cap=None):
    logits = F.linear(x.hidden, x.weight, x.bias) * logit_scale
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)


def dense_logps(x, **settings):
    logps = F.log_softmax(dense_logits(x, **settings), dim=-1)
    return logps.gather(1, x.targets[:, None])[:, 0]


def values_and_gradients(x, logps):
    logps.backward(x.upstream.to(logps.dtype))
    found = {"logps": logps, "hidden": x.hidden.grad, "weight": x.weight.grad}
    if x.bias is not None:
        found["bias"] = x.bias.grad
    return {name: t.detach().double() for name, t in found.items()}


def assert_within_budget(found, plain, exact):
    """error(kernel vs fp64) ≤ error(same-dtype torch vs fp64) + a rounding of fp32."""
    assert found.keys() <= exact.keys()
    for name, value in found.items():
        assert value.shape == exact[name].shape, name
        assert value.isfinite().all(), name
        if not value.numel():
            continue
        error, budget = rms(value - exact[name]), rms(plain[name] - exact[name])
        assert error <= budget + 1e-6 * exact[name].abs().max(), (name, error, budget)


def rms(values):
    """Over all entries: the largest of bf16's rounding errors is a matter of luck."""
    return values.square().mean().sqrt()


def oracles(x, dtype, **settings):
    runs = (x.cast(dtype), x.cast(torch.float64))
    return [values_and_gradients(run, dense_logps(run, **settings)) for run in runs]


@pytest.fixture(params=["one block", "eleven blocks"])
def max_logits_bytes(request, monkeypatch):
    """507 entries of the vocabulary at once, or 50 at a time with a short last block."""
    if request.param == "one block":
        return 1 << 24
    monkeypatch.setattr(token_logprobs_module, "MIN_BLOCK", 50)
    return 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("bias", [False, True])
def test_error_budget_of_values_and_dense_gradients(max_logits_bytes, dtype, settings, bias):
    x = inputs_of(252, 123, 507, dtype, bias=bias)
    ours = x.cast(dtype)
    settings_and_blocks = {**settings, "max_logits_bytes": max_logits_bytes}
    logps = token_logprobs(
        ours.hidden, ours.weight, x.targets, bias=ours.bias, **settings_and_blocks
    )
    assert logps.dtype == torch.float32
    found = values_and_gradients(ours, logps)
    assert (ours.hidden.grad.dtype, ours.weight.grad.dtype) == (dtype, dtype)
    assert_within_budget(found, *oracles(x, dtype, **settings))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_error_budget_of_selected_gradients(max_logits_bytes, dtype, kind):
    x = inputs_of(61, 23, 507, dtype, bias=True)
    settings = {"logit_scale": 1.7, "soft_cap": 3.0}
    entries, hidden = entries_of(kind, (507, 23)), x.hidden.clone().requires_grad_()
    selected = torch.zeros(entries.numel, requires_grad=True)
    bias = x.bias.clone().requires_grad_()
    handle = WeightHandle(x.weight, selected, entries, bias)
    logps = token_logprobs(hidden, handle, x.targets, max_logits_bytes=max_logits_bytes, **settings)
    logps.backward(x.upstream)
    assert selected.grad.dtype == torch.float32
    found = {"logps": logps.detach(), "hidden": hidden.grad, "bias": bias.grad}
    found = {name: t.double() for name, t in found.items()}
    found["weight"] = selected.grad.double()
    at = flat_order(entries)
    expected = oracles(x, dtype, **settings)
    for run in expected:
        run["weight"] = run["weight"].reshape(-1)[at]
    assert_within_budget(found, *expected)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 3), (3, 1, 257), (2, 7, 256), (5, 33, 769)])
def test_small_and_odd_shapes(shape):
    x = inputs_of(*shape)
    ours = x.cast(torch.float32)
    logps = token_logprobs(ours.hidden, ours.weight, x.targets, max_logits_bytes=1)
    assert_within_budget(values_and_gradients(ours, logps), *oracles(x, torch.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_no_targets(kind):
    x, entries = inputs_of(0, 7, 300), entries_of(kind, (300, 7))
    hidden = x.hidden.requires_grad_()
    selected = torch.zeros(entries.numel, requires_grad=True)
    handle = WeightHandle(x.weight, selected, entries)
    logps, statistics = token_logprobs_with_statistics(hidden, handle, x.targets)
    assert logps.shape == statistics.entropy_nats.shape == statistics.is_argmax.shape == (0,)
    logps.sum().backward()
    assert hidden.grad.shape == (0, 7)
    assert torch.equal(selected.grad, torch.zeros(entries.numel))


def test_by_hand():
    # logits (0, ln 3): probabilities 1/4 and 3/4
    hidden, weight = torch.ones(2, 1), torch.tensor([[0.0], [math.log(3)]], requires_grad=True)
    logps = token_logprobs(hidden, weight, torch.tensor([0, 1]))
    torch.testing.assert_close(logps, torch.tensor([math.log(0.25), math.log(0.75)]))
    logps[0].backward()  # onehot − softmax
    torch.testing.assert_close(weight.grad, torch.tensor([[0.75], [-0.75]]))


def test_mixed_precision_runs_in_the_dtype_of_the_hidden_states():
    x = inputs_of(61, 23, 507)
    rounded = Inputs(x.hidden.bfloat16(), x.weight.bfloat16(), None, x.targets, x.upstream)
    hidden, weight = rounded.hidden.clone().requires_grad_(), x.weight.clone().requires_grad_()
    logps = token_logprobs(hidden, weight, x.targets)
    logps.backward(x.upstream)
    assert weight.grad.dtype == torch.float32
    found = {"logps": logps.detach(), "hidden": hidden.grad, "weight": weight.grad}
    found = {name: t.double() for name, t in found.items()}
    assert_within_budget(found, *oracles(rounded, torch.bfloat16))


def test_autocast_changes_nothing():
    x = inputs_of(61, 23, 507)
    plain, cast = x.cast(torch.float32), x.cast(torch.float32)
    expected = values_and_gradients(plain, token_logprobs(plain.hidden, plain.weight, x.targets))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = token_logprobs(cast.hidden, cast.weight, x.targets)
        found = values_and_gradients(cast, logps)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_only_what_asks_gets_a_gradient():
    x = inputs_of(5, 7, 300)
    assert not token_logprobs(x.hidden, x.weight, x.targets).requires_grad
    hidden = x.hidden.clone().requires_grad_()
    token_logprobs(hidden, x.weight, x.targets).sum().backward()
    assert hidden.grad is not None
    assert x.weight.grad is None
    selected = torch.zeros(2100, requires_grad=True)
    handle = WeightHandle(x.weight, selected, entries_of("all", (300, 7)))
    token_logprobs(x.hidden, handle, x.targets).sum().backward()
    assert selected.grad is not None
    assert x.hidden.grad is None


def test_a_frozen_handle_is_the_weight():
    x = inputs_of(5, 7, 300, bias=True)
    plain = token_logprobs(x.hidden, x.weight, x.targets, bias=x.bias)
    handle = WeightHandle(x.weight, bias=x.bias)
    assert torch.equal(token_logprobs(x.hidden, handle, x.targets), plain)


def test_large_logits_neither_overflow_nor_turn_nan():
    x = inputs_of(61, 23, 507)
    hidden, weight = (1e4 * x.hidden).requires_grad_(), (1e4 * x.weight).requires_grad_()
    best = (hidden @ weight.t()).argmax(1)
    for targets, bound in ((best, -1e-3), (x.targets, -torch.inf)):
        logps = token_logprobs(hidden, weight, targets, max_logits_bytes=1)
        assert (logps <= 0).all() and (logps >= bound).all() and logps.isfinite().all()
        logps.sum().backward()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_a_vocabulary_entry_that_cannot_occur():
    x = inputs_of(6, 7, 300, bias=True)
    bias, targets = x.bias.clone(), torch.tensor([0, 1, 2, 3, 4, 299])
    bias[-1] = bias[5] = -torch.inf
    hidden = x.hidden.clone().requires_grad_()
    logps = token_logprobs(hidden, x.weight, targets, bias=bias, max_logits_bytes=1)
    assert logps[:5].isfinite().all()
    assert logps[5] == -torch.inf
    logps.backward(torch.tensor([1.0, 1, 1, 1, 1, 0]))  # its token weight is 0
    assert hidden.grad.isfinite().all()
    assert (hidden.grad[5] == 0).all()


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("max_logits_bytes", [1, 1 << 20])
def test_statistics_against_dense(settings, max_logits_bytes):
    x = inputs_of(252, 123, 507, bias=True)
    double = x.cast(torch.float64)
    logits = dense_logits(double, **settings).detach()
    x.targets[::2] = logits.argmax(1)[::2]
    logps, found = token_logprobs_with_statistics(
        x.hidden, x.weight, x.targets, bias=x.bias, max_logits_bytes=max_logits_bytes, **settings
    )
    probabilities = torch.distributions.Categorical(logits=logits)
    tolerance = {"check_dtype": False, "rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found.entropy_nats, probabilities.entropy(), **tolerance)
    torch.testing.assert_close(found.mean_logit, logits.mean(1), **tolerance)
    assert torch.equal(found.is_argmax, logits.argmax(1) == x.targets)
    plain = token_logprobs(x.hidden, x.weight, x.targets, bias=x.bias, **settings)
    torch.testing.assert_close(logps, plain)
    assert found.entropy_nats.dtype == found.mean_logit.dtype == torch.float32


def test_statistics_carry_no_gradient():
    x = inputs_of(5, 7, 300).cast(torch.float32)
    logps, found = token_logprobs_with_statistics(x.hidden, x.weight, x.targets)
    assert logps.requires_grad
    assert not found.entropy_nats.requires_grad
    assert not found.mean_logit.requires_grad


class LargestTensor(TorchDispatchMode):
    """Records how many elements the largest tensor has that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_the_probe_sees_dense_logits_in_both_passes():
    x = inputs_of(300, 8, 4000).cast(torch.float32)
    with LargestTensor() as forward:
        logps = dense_logps(x)
    with LargestTensor() as backward:
        logps.sum().backward()
    assert forward.numel == backward.numel == 300 * 4000


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_never_exist_whole(dtype):
    n, d, v, block = 300, 8, 40_000, 400
    copies = 2 if dtype == torch.float32 else 3  # that the budget has to hold
    x, entries = inputs_of(n, d, v, dtype), entries_of("elements", (v, d))
    hidden, selected = x.hidden.requires_grad_(), torch.zeros(entries.numel, requires_grad=True)
    handle = WeightHandle(x.weight, selected, entries)
    with LargestTensor() as seen:
        logps, _ = token_logprobs_with_statistics(
            hidden, handle, x.targets, max_logits_bytes=4 * n * block * copies
        )
        logps.sum().backward()
    assert seen.numel == n * block  # 1 % of n * v


@pytest.mark.parametrize("kind", ["rows", "columns", "elements"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_few_targets_do_not_bring_a_dense_weight_gradient(kind, dtype):
    n, d, v, block = 2, 64, 20_000, 512
    x, entries = inputs_of(n, d, v, dtype), entries_of(kind, (v, d))
    selected = torch.zeros(entries.numel, requires_grad=True)
    handle = WeightHandle(x.weight, selected, entries)
    with LargestTensor() as seen:
        logps = token_logprobs(x.hidden, handle, x.targets, max_logits_bytes=4 * d * block)
        logps.sum().backward()
    assert seen.numel <= max(d * block, entries.numel)


def test_bad_input_is_an_error():
    x = inputs_of(4, 7, 300)
    for targets, message in (
        (torch.tensor([0, 1, 2, 300]), r"targets in \[0, 300\], the vocabulary has 300"),
        (torch.tensor([0, 1, 2, -100]), r"targets in \[-100, 2\]"),
        (torch.tensor([0, 1, 2]), "do not fit hidden"),
    ):
        with pytest.raises(ValueError, match=message):
            token_logprobs(x.hidden, x.weight, targets)
    for hidden in (x.hidden[:, :5], x.hidden[None]):
        with pytest.raises(ValueError, match="does not fit head"):
            token_logprobs(hidden, x.weight, x.targets)
    with pytest.raises(ValueError, match="bias"):
        token_logprobs(x.hidden, x.weight, x.targets, bias=torch.zeros(1))
    with pytest.raises(ValueError, match="brings its own bias"):
        token_logprobs(x.hidden, WeightHandle(x.weight), x.targets, bias=torch.zeros(300))
