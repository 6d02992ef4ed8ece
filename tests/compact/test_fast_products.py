"""Linear layers with the faster products are the plain ones to rounding, in value and gradient."""

import copy

import pytest
import torch
from torch import nn

from lit_align.compact import reference_policy, restrict, use_fast_products
from lit_align.compact.fast_products import FastLinear, linear_kind
from lit_align.masks import select
from lit_align_kernels import products
from tests.compact.test_restrict import make_mask
from tests.tiny_models import tiny_model

IDS = torch.arange(3, 27).view(2, 12)


@pytest.fixture(autouse=True)
def _faster_products(monkeypatch):
    """The layers' own path is taken on every processor."""
    monkeypatch.setattr("lit_align.compact.fast_products.has_faster_products", lambda: True)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_values_and_gradients_are_the_plain_models(kind):
    plain = tiny_model(kind)
    fast = use_fast_products(tiny_model(kind))
    changed = [m for m in fast.modules() if isinstance(m, FastLinear)]
    assert len(changed) == sum(linear_kind(m) is not None for m in plain.modules()) > 4
    losses = []
    for model in (plain, fast):
        logits = model(input_ids=IDS).logits
        losses.append(logits.log_softmax(-1)[..., 5].sum())
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-4)
    for (name, a), (_, b) in zip(plain.named_parameters(), fast.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("granularity", ["element", "row"])
def test_restricted_layers_keep_them_and_give_the_same_gradient(kind, granularity):
    plain, fast = tiny_model(kind), use_fast_products(tiny_model(kind))
    mask = make_mask(plain, 0.2, granularity)
    gradients = []
    for model in (plain, fast):
        restrict(model, mask)
        model(input_ids=IDS).logits.log_softmax(-1)[..., 5].sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_the_reference_is_bitwise_the_base_with_the_same_products():
    base = use_fast_products(tiny_model("llama"))
    model = restrict(copy.deepcopy(base), make_mask(base))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    with torch.no_grad(), reference_policy(model):
        assert torch.equal(model(input_ids=IDS).logits, base(input_ids=IDS).logits)


def test_the_layer_calls_the_faster_library(monkeypatch):
    calls = []
    monkeypatch.setattr(products, "_onednn", lambda a, b, bias: calls.append(a.shape))
    layer = use_fast_products(nn.Sequential(nn.Linear(6, 4)))
    layer(torch.ones(3, 6))
    assert calls == [(3, 6)]
    layer(torch.ones(1, 6))  # one row: generation
    layer.double()(torch.ones(3, 6, dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(torch.ones(3, 6)).dtype == torch.bfloat16
    assert len(calls) == 1


def test_the_result_may_be_changed_in_place():
    layer = use_fast_products(nn.Sequential(nn.Linear(6, 4)))
    y = layer(torch.ones(2, 3, 6))
    y += 1
    y.sum().backward()
    assert layer[0].bias.grad.tolist() == [6.0] * 4


def test_a_partly_trained_bias_gets_its_gradient():
    layer = use_fast_products(nn.Sequential(nn.Linear(6, 4)))
    scores = {"0.weight": torch.zeros(4, 6), "0.bias": torch.arange(1.0, 5.0)}
    restrict(layer, select(scores, 2 / 28))
    assert isinstance(layer[0], FastLinear)
    layer(torch.ones(3, 6)).sum().backward()
    assert layer[0].selected_bias.grad.tolist() == [3.0] * 2


def test_what_has_a_forward_of_its_own_is_left_alone():
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = use_fast_products(nn.Sequential(Twice(2, 2), nn.LayerNorm(2)))
    assert [type(m) for m in model] == [Twice, nn.LayerNorm]
    assert linear_kind(model[0]) is None
