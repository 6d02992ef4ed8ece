"""The objectives by hand, and the settings they refuse."""

import math

import pytest
import torch
import torch.nn.functional as F

from lit_align.batch import CHOSEN, REJECTED, PackedBatch
from lit_align.errors import TrainingError
from lit_align.modules import MaskedDPO, SupervisedFineTuning, TokenWeightedNPO
from tests.tiny_models import tiny_model

# A pair: a chosen response of two tokens, a rejected one of three.
LOGPS = torch.tensor([-1.0, -3.0, -2.0, -2.0, -5.0])
REFERENCE = torch.tensor([-2.0, -4.0, -1.0, -2.0, -3.0])


def pair() -> PackedBatch:
    ids = torch.tensor([[5, 6, 7, 0], [5, 8, 9, 10]])
    return PackedBatch(
        input_ids=ids,
        position_ids=torch.arange(4).repeat(2, 1),
        attention_mask=torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
        hidden_index=torch.tensor([0, 1, 4, 5, 6]),
        target_ids=torch.tensor([6, 7, 8, 9, 10]),
        sequence_index=torch.tensor([0, 0, 1, 1, 1]),
        token_weights=torch.tensor([1.0, 1.0, 1.0, 0.0, 0.5]),
        sequence_roles=torch.tensor([CHOSEN, REJECTED]),
        row_ids=torch.tensor([0, 0]),
    )


def test_ipo_takes_means_over_the_responses_tokens():
    batch = pair()
    batch.token_weights = torch.ones(5)
    objective = MaskedDPO("m", loss_type="ipo", beta=0.5).objective(batch, LOGPS, REFERENCE)
    h = (1 + 1) / 2 - (-1 + 0 - 2) / 3
    assert float(objective.loss_sum) == pytest.approx((h - 1 / (2 * 0.5)) ** 2)
    assert float(objective.units) == 1


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


BETA = 0.5
# Δ of the rejected tokens is -1, 0 and -2, their weights 1, 0 and 0.5.
FORGET = {
    "token": softplus(BETA * -1) + 0.5 * softplus(BETA * -2),
    "sequence": 2 / BETA * softplus(BETA * (-1 - 0.5 * 2)),
}
FORGET_UNITS = {"token": 2, "sequence": 1}
RETAIN_UNITS = {"token": 2, "sequence": 1}


@pytest.mark.parametrize("loss_type", ["token", "sequence"])
def test_retaining_by_likelihood(loss_type):
    module = TokenWeightedNPO("m", beta=BETA, loss_type=loss_type, retain="nll", retain_weight=2.0)
    objective = module.objective(pair(), LOGPS, REFERENCE)
    retain = {"token": 1.0 + 3.0, "sequence": (1.0 + 3.0) / 2}[loss_type]
    assert float(objective.loss_sum) == pytest.approx(FORGET[loss_type] + 2 * retain)
    assert float(objective.units) == FORGET_UNITS[loss_type] + RETAIN_UNITS[loss_type]


@pytest.mark.parametrize("loss_type", ["token", "sequence"])
def test_retaining_by_divergence_from_the_reference(loss_type):
    """KL(π_ref ‖ π) = Σ_v π_ref(v)·(log π_ref(v) − log π(v)), not the other way round."""
    module = TokenWeightedNPO(
        "m", beta=BETA, loss_type=loss_type, retain="kl", retain_weight=2.0, reference="swap"
    )
    model, batch = tiny_model("llama").eval(), pair()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    module.language_model = model
    logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
    policy = F.log_softmax(logits[0, :2].double(), -1).detach()
    reference = F.log_softmax(3 * torch.randn(2, 384, dtype=torch.double), -1)
    module._ref_distributions = reference.float()
    objective = module.objective(batch, LOGPS, REFERENCE)
    kl = (reference.exp() * (reference - policy)).sum(-1)
    reverse = (policy.exp() * (policy - reference)).sum(-1)
    assert float((kl - reverse).abs().min()) > 0.01
    retain = float(kl.sum() if loss_type == "token" else kl.mean())
    assert float(objective.loss_sum) == pytest.approx(FORGET[loss_type] + 2 * retain, rel=1e-4)
    assert float(objective.units) == FORGET_UNITS[loss_type] + RETAIN_UNITS[loss_type]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (MaskedDPO, {"loss_type": "sigmod"}),
        (MaskedDPO, {"beta": 0.0}),
        (MaskedDPO, {"label_smoothing": 0.7}),
        (MaskedDPO, {"loss_type": "ipo", "label_smoothing": 0.1}),
        (TokenWeightedNPO, {"loss_type": "tokn"}),
        (TokenWeightedNPO, {"retain": "klx"}),
        (TokenWeightedNPO, {"beta": -1.0}),
        (SupervisedFineTuning, {"lr_scheduler": "cosinus"}),
        (MaskedDPO, {"reference": "cached"}),
    ],
)
def test_settings_out_of_range_are_refused_at_once(kind, settings):
    with pytest.raises(TrainingError, match=next(iter(settings)) if len(settings) == 1 else "ipo"):
        kind("m", **settings)
