"""One pass over the head against plain autograd in fp64, chunk by chunk and group by group."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import lit_align_kernels.token_logprobs.chunks as chunks_module
from lit_align_kernels.token_logprobs import WeightHandle
from lit_align_kernels.weighted_preference_loss import TokenNPO, weighted_preference_loss
from lit_align_kernels.weighted_preference_loss.reference import npo_rows_
from tests.kernels.cases import KINDS, entries_of, flat_order

N, D, V = 61, 23, 507
BETA = 0.5
DTYPES = [torch.float32, torch.bfloat16]
SETTINGS = [{}, {"logit_scale": 0.35}, {"soft_cap": 2.5}, {"logit_scale": 1.7, "soft_cap": 3.0}]
PAIRS = (0, 12, 13, 40, 40, 61)  # four groups and an empty one
BUDGETS = {"one chunk": 1 << 24, "some tokens": 4 * V * 15, "one token": 1}


class Case:
    """Inputs of one loss; `leaves` gives fresh ones in a dtype."""

    def __init__(self, dtype=torch.float32, n=N, d=D, v=V, bias=True, ignored=True):
        g = torch.Generator().manual_seed(5)
        self.hidden = torch.randn(n, d, generator=g).to(dtype)
        self.weight = (2 * torch.randn(v, d, generator=g) / math.sqrt(d)).to(dtype)
        self.bias = torch.randn(v, generator=g).to(dtype) if bias else None
        self.targets = torch.randint(0, v, (n,), generator=g)
        self.targets[0], self.targets[-1] = 0, v - 1
        if ignored:
            self.targets[3::7] = -100
        self.ref = -torch.rand(n, generator=g) * 5 - 3
        self.weights = torch.rand(n, generator=g) * (torch.rand(n, generator=g) > 0.3)

    def leaves(self, dtype):
        given = (self.hidden, self.weight, self.bias)
        return [None if t is None else t.detach().to(dtype).requires_grad_() for t in given]


def token_npo(case, logps, start=0, stop=None):
    at = slice(start, stop)
    u = BETA * (logps - case.ref[at].to(logps))
    counted = (case.targets[at] != -100) & (case.weights[at] != 0)
    losses = -F.logsigmoid(-u.where(counted, 0.0))
    return (losses * case.weights[at].where(counted, 0.0)).sum()


def squared_sums(case, logps, start=0, stop=None):
    """Not separable: every group's weighted sum, through a filter of its best third, squared."""
    total = logps.new_zeros(())
    stop = len(case.targets) if stop is None else stop
    for first, last in pairwise(PAIRS):
        if first == last or first < start or last > stop:
            continue
        part = logps[first - start : last - start]
        rewards = part.detach() - case.ref[first:last].to(part)
        kept = rewards <= rewards.sort().values[(2 * (last - first)) // 3]
        total = total + (part * case.weights[first:last] * kept).sum().square()
    return total


LOSSES = {"npo": token_npo, "groups": squared_sums}


def dense(case, leaves, loss, logit_scale=1.0, soft_cap=None):
    """Loss, log-probs and gradients by plain autograd."""
    hidden, weight, bias = leaves
    logits = F.linear(hidden, weight, bias) * logit_scale
    logits = logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
    counted = case.targets != -100
    at = case.targets.where(counted, 0)[:, None]
    logps = F.log_softmax(logits, dim=-1).gather(1, at)[:, 0].where(counted, 0.0)
    total = loss(case, logps)
    total.backward()
    return found_of(total, logps, leaves)


def found_of(total, logps, leaves):
    names = ("hidden", "weight", "bias")
    grads = {n: t.grad for n, t in zip(names, leaves, strict=True) if t is not None}
    return {n: t.detach().double() for n, t in {"loss": total, "logps": logps, **grads}.items()}


def objective_of(case, name):
    if name == "npo":
        return {"loss": TokenNPO(BETA, case.ref, case.weights)}
    return {"loss": lambda *a: LOSSES[name](case, *a), "groups": PAIRS}


def assert_within_budget(found, plain, exact, slack=2.0):
    """error(one pass vs fp64) ≤ slack · error(same-dtype torch vs fp64) + a rounding of fp32."""
    for name, value in found.items():
        assert value.shape == exact[name].shape, name
        assert value.isfinite().all(), name
        error, budget = rms(value - exact[name]), rms(plain[name] - exact[name])
        assert error <= slack * budget + 1e-6 * exact[name].abs().max(), (name, error, budget)


def rms(values):
    return values.square().mean().sqrt()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_error_budget(budget, loss, settings, dtype):
    case = Case(dtype)
    exact = dense(case, case.leaves(torch.float64), LOSSES[loss], **settings)
    plain = dense(case, case.leaves(dtype), LOSSES[loss], **settings)
    leaves = case.leaves(dtype)
    total, logps = weighted_preference_loss(
        leaves[0], leaves[1], case.targets, bias=leaves[2],
        max_logits_bytes=BUDGETS[budget], **objective_of(case, loss), **settings,
    )  # fmt: skip
    assert total.dtype == logps.dtype == torch.float32
    assert not logps.requires_grad
    total.backward()
    assert [t.grad.dtype for t in leaves] == [dtype] * 3
    assert_within_budget(found_of(total, logps, leaves), plain, exact)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_selected_entries_alone(kind, loss, dtype):
    case, entries = Case(dtype), entries_of(kind, (V, D))
    exact = dense(case, case.leaves(torch.float64), LOSSES[loss])
    plain = dense(case, case.leaves(dtype), LOSSES[loss])
    hidden, _, bias = case.leaves(dtype)
    selected = torch.zeros(entries.numel, requires_grad=True)
    handle = WeightHandle(case.weight, selected, entries, bias)
    total, logps = weighted_preference_loss(
        hidden, handle, case.targets, max_logits_bytes=4 * V * 15, **objective_of(case, loss)
    )
    total.backward()
    assert selected.grad.dtype == torch.float32
    found = {"loss": total, "logps": logps, "hidden": hidden.grad, "bias": bias.grad}
    found = {n: t.detach().double() for n, t in found.items()}
    assert_within_budget(found, plain, exact)
    # One entry's rounding is a matter of luck: the budget is the dense gradient's.
    spread = torch.zeros(V * D, dtype=torch.float64)
    spread[flat_order(entries)] = selected.grad.double()
    error = (spread - exact["weight"].view(-1))[flat_order(entries)]
    assert len(error) == entries.numel
    if len(error):
        budget = rms(plain["weight"] - exact["weight"])
        assert rms(error) <= 2 * budget + 1e-6 * exact["weight"].abs().max()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", [1.0, 3.0, 0.0])
def test_what_arrives_multiplies_the_gradients(loss, scale):
    case = Case()
    once, scaled = case.leaves(torch.float32), case.leaves(torch.float32)
    for leaves, factor in ((once, 1.0), (scaled, scale)):
        total, _ = weighted_preference_loss(
            leaves[0], leaves[1], case.targets, bias=leaves[2], **objective_of(case, loss)
        )
        (factor * total).backward()
    for one, other in zip(once, scaled, strict=True):
        torch.testing.assert_close(other.grad, scale * one.grad)


def test_a_second_backward_is_an_error():
    case = Case()
    hidden, weight, _ = case.leaves(torch.float32)
    total, _ = weighted_preference_loss(hidden, weight, case.targets, **objective_of(case, "npo"))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        total.backward()


@pytest.mark.parametrize("loss", LOSSES)
def test_without_gradients_it_is_the_same(loss):
    case = Case()
    leaves = case.leaves(torch.float32)
    given = {"bias": leaves[2], "max_logits_bytes": 4 * V * 15, **objective_of(case, loss)}
    trained = weighted_preference_loss(leaves[0], leaves[1], case.targets, **given)
    with torch.no_grad():
        plain = weighted_preference_loss(leaves[0], leaves[1], case.targets, **given)
    assert not plain[0].requires_grad
    torch.testing.assert_close(plain, tuple(t.detach() for t in trained))


def test_only_what_asks_gets_a_gradient():
    case = Case(bias=False)
    hidden, weight, _ = case.leaves(torch.float32)
    given = objective_of(case, "npo")
    weighted_preference_loss(hidden, case.weight, case.targets, **given)[0].backward()
    weighted_preference_loss(case.hidden, weight, case.targets, **given)[0].backward()
    assert hidden.grad is not None and weight.grad is not None
    assert case.hidden.grad is None and case.weight.grad is None


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("budget", [4 * V * 15, 4 * V * 27, 1 << 24])
def test_logits_stay_within_the_budget(loss, budget, monkeypatch):
    seen = []
    form = chunks_module.Chunks.logits

    def recorded(self, start, stop):
        logits = form(self, start, stop)
        seen.append((start, stop, logits.numel() * logits.element_size()))
        return logits

    monkeypatch.setattr(chunks_module.Chunks, "logits", recorded)
    case = Case()
    hidden, weight, _ = case.leaves(torch.float32)
    weighted_preference_loss(
        hidden, weight, case.targets, max_logits_bytes=budget, **objective_of(case, loss)
    )
    assert max(size for _, _, size in seen) <= budget
    formed = sorted(i for start, stop, _ in seen for i in range(start, stop))
    rows = budget // (4 * V)
    twice = [] if loss == "npo" else [
        i for a, b in pairwise(PAIRS) if b - a > rows for i in range(a, b)
    ]  # fmt: skip
    assert formed == sorted([*range(N), *twice])  # the groups beyond the budget twice


@pytest.mark.parametrize("rows", [1, 15, 27, 40, 61])
def test_groups_are_never_split(rows):
    calls = []

    def loss(logps, start, stop):
        calls.append((start, stop))
        assert len(logps) == stop - start
        return logps.sum()

    case = Case()
    hidden, weight, _ = case.leaves(torch.float32)
    weighted_preference_loss(
        hidden, weight, case.targets, loss, groups=PAIRS, max_logits_bytes=4 * V * rows
    )
    assert {bound for call in calls for bound in call} <= set(PAIRS)
    assert [stop for _, stop in calls[:-1]] == [start for start, _ in calls[1:]]
    assert (calls[0][0], calls[-1][1]) == (0, N)
    assert all(b - a <= rows or (a, b) in pairwise(PAIRS) for a, b in calls)


def test_a_token_without_weight_may_be_impossible():
    case = Case(ignored=False)
    case.bias[5] = -torch.inf
    case.targets[8], case.weights[8], case.ref[8] = 5, 0.0, -torch.inf
    leaves = case.leaves(torch.float32)
    total, logps = weighted_preference_loss(
        leaves[0], leaves[1], case.targets, bias=leaves[2], **objective_of(case, "npo")
    )
    total.backward()
    assert logps[8] == -torch.inf
    assert total.isfinite()
    assert all(t.grad.isfinite().all() for t in leaves)
    assert (leaves[0].grad[8] == 0).all()


def test_a_target_whose_probability_underflows_keeps_its_log_prob():
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [300.0], [299.0]])
    loss = TokenNPO(0.1, torch.tensor([-290.0]), torch.ones(1))
    total, logps = weighted_preference_loss(
        hidden.requires_grad_(), weight, torch.tensor([0]), loss
    )
    expected = -300 - math.log1p(math.exp(-1))
    assert float(logps) == pytest.approx(expected, rel=1e-6)
    u = 0.1 * (expected + 290)
    assert total.item() == pytest.approx(math.log1p(math.exp(u)), rel=1e-5)
    total.backward()
    mean = 300 / (1 + math.exp(-1)) + 299 / (1 + math.exp(1))
    assert float(hidden.grad) == pytest.approx(-mean * 0.1 / (1 + math.exp(-u)), rel=1e-5)


def test_by_hand():
    # logits (0, ln 3): log-probs ln ¼ and ln ¾; at policy = reference the loss is ln 2 a token
    hidden, weight = torch.ones(2, 1), torch.tensor([[0.0], [math.log(3)]], requires_grad=True)
    reference = torch.tensor([0.25, 0.75]).log()
    total, logps = weighted_preference_loss(
        hidden, weight, torch.tensor([0, 1]), TokenNPO(1.0, reference, torch.tensor([1.0, 2.0]))
    )
    torch.testing.assert_close(logps, reference)
    assert total.item() == pytest.approx(3 * math.log(2))
    total.backward()  # ½ · (onehot − softmax) each, the second twice
    torch.testing.assert_close(weight.grad, torch.tensor([[0.375 - 0.25], [0.25 - 0.375]]))


@pytest.mark.parametrize("loss", LOSSES)
def test_no_targets(loss):
    case = Case(n=2, ignored=False)
    hidden, weight = torch.empty(0, D, requires_grad=True), case.weight.requires_grad_()
    none = torch.empty(0)
    objective = TokenNPO(0.1, none, none) if loss == "npo" else lambda logps, *_: logps.sum()
    total, logps = weighted_preference_loss(
        hidden, weight, torch.empty(0, dtype=torch.int64), objective
    )
    total.backward()
    assert logps.shape == (0,) and total.item() == 0
    assert torch.equal(weight.grad, torch.zeros(V, D)) and hidden.grad.shape == (0, D)


def test_a_loss_of_nothing_has_no_gradient():
    case = Case()
    hidden, weight, _ = case.leaves(torch.float32)
    total, _ = weighted_preference_loss(
        hidden, weight, case.targets, lambda *_: torch.tensor(7.0), groups=PAIRS
    )
    total.backward()
    assert not hidden.grad.any() and not weight.grad.any()


def test_autocast_changes_nothing():
    case = Case()
    totals = []
    for enabled in (False, True):
        hidden, weight, _ = case.leaves(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            total, _ = weighted_preference_loss(
                hidden, weight, case.targets, **objective_of(case, "groups")
            )
            total.backward()
        totals.append((total.detach(), hidden.grad, weight.grad))
    for one, other in zip(*totals, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("settings", SETTINGS)
def test_rows_in_place(dtype, settings):
    """The definition that the Triton kernel is compared with."""
    case = Case(dtype)
    raw = F.linear(case.hidden.float(), case.weight.float()).to(dtype)
    exact = raw.double().requires_grad_()
    z = exact * settings.get("logit_scale", 1.0)
    cap = settings.get("soft_cap")
    z = z if cap is None else cap * torch.tanh(z / cap)
    counted = case.targets != -100
    logps = z.log_softmax(1).gather(1, case.targets.where(counted, 0)[:, None])[:, 0]
    logps = logps.where(counted, 0.0)
    token_npo(case, logps).backward()
    logits = raw.clone()
    losses, found = npo_rows_(
        logits, case.targets, case.ref, case.weights, BETA,
        settings.get("logit_scale", 1.0), cap, -100,
    )  # fmt: skip
    torch.testing.assert_close(found.double(), logps.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.double().sum(), token_npo(case, logps.detach()))
    assert (losses[~counted] == 0).all() and not logits[~counted].any()
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(logits.double(), exact.grad, rtol=4 * tolerance, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": (0, 12)}, "groups"),
        ({"groups": (0, 40, 12, N)}, "groups"),
        ({"groups": (1, N)}, "groups"),
        ({"loss": TokenNPO(0.1, torch.zeros(3), torch.zeros(N))}, "ref_per_token_logps"),
        ({"loss": TokenNPO(0.1, torch.zeros(N), torch.zeros(3))}, "token_weights"),
        ({"loss": TokenNPO(0.0, torch.zeros(N), torch.zeros(N))}, "beta"),
        ({"targets": torch.full((N,), V)}, "vocabulary"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "do not fit hidden"),
        ({"bias": torch.zeros(3)}, "bias"),
    ],
)
def test_bad_input_is_an_error(change, message):
    case = Case()
    given = {"loss": lambda logps, *_: logps.sum(), "targets": case.targets, **change}
    with pytest.raises(ValueError, match=message):
        weighted_preference_loss(case.hidden, case.weight, **given)


def test_a_bias_beside_a_handle_is_an_error():
    case = Case()
    with pytest.raises(ValueError, match="its own bias"):
        weighted_preference_loss(
            case.hidden, WeightHandle(case.weight), case.targets, bias=case.bias,
            **objective_of(case, "npo"),
        )  # fmt: skip
