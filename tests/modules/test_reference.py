"""Reference log-probs: cached or by swapping, of the base and of a delta'd start."""

import math

import pytest
import torch

from lit_align.callbacks import KeyParameterLocalization
from lit_align.compact import apply_delta, export_delta
from lit_align.errors import TrainingError
from lit_align.language_model import load_language_model
from lit_align.modules import MaskedDPO, TokenWeightedNPO
from tests.training_runs import (
    MemoryLogger,
    assert_close_weights,
    preferences,
    random_mask,
    trainer,
    unlearning,
    weights,
)

LEARN = {"learning_rate": 1e-2, "eps": 1e-3, "warmup_ratio": 0.0}


@pytest.fixture
def mask_path(tmp_path):
    random_mask().save(tmp_path / "mask")
    return str(tmp_path / "mask")


def fit(module, data, tmp_path, mask=None, **settings):
    log = MemoryLogger()
    callbacks = [KeyParameterLocalization(mask=mask)] if mask else []
    run = trainer(tmp_path, logger=log, log_every_n_steps=1, callbacks=callbacks, **settings)
    run.fit(module, data)
    return log


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", [MaskedDPO, TokenWeightedNPO])
def test_cache_and_swap_are_equal(kind, precision, tiny_llama_dir, mask_path, tmp_path):
    data = preferences if kind is MaskedDPO else unlearning
    logs, trained = [], []
    for reference in ("cache", "swap"):
        module = kind(str(tiny_llama_dir), reference=reference, **LEARN)
        # One row a batch: in bf16 log-probs depend on what else is in a batch.
        rows = data(8, batch_size=1)
        settings = {"accumulate_grad_batches": 2, "precision": precision}
        logs.append(fit(module, rows, tmp_path, mask_path, **settings))
        trained.append(weights(module))
    exact = precision == "32-true"  # in bf16 a forward with gradient may round otherwise
    losses = [log.values("loss") for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if exact else 5e-4)
    assert_close_weights(trained[0], trained[1], atol=1e-6 if exact else 1e-3)
    if kind is MaskedDPO:
        assert losses[0][0] == pytest.approx(math.log(2), abs=1e-6 if exact else 1e-4)


def test_the_reference_of_a_deltad_start_includes_the_delta(tiny_llama_dir, mask_path, tmp_path):
    first = MaskedDPO(str(tiny_llama_dir), **LEARN)
    fit(first, preferences(8), tmp_path, mask_path)
    delta = str(tmp_path / "delta")
    export_delta(first.model, delta)
    losses = []
    for reference in ("cache", "swap"):
        module = MaskedDPO(str(tiny_llama_dir), delta=delta, reference=reference, **LEARN)
        log = fit(module, preferences(8), tmp_path, mask_path)
        losses.append(log.values("loss"))
        assert log.values("loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    start, _ = load_language_model(tiny_llama_dir)
    apply_delta(start, delta)
    unselected = ~random_mask().dense("model.layers.0.mlp.up_proj.weight")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(weights(module)[name][unselected], start.state_dict()[name][unselected])


def test_swap_needs_a_mask(tiny_llama_dir, tmp_path):
    with pytest.raises(TrainingError, match="trains the whole model"):
        fit(MaskedDPO(str(tiny_llama_dir), reference="swap"), preferences(4), tmp_path)


def test_retaining_by_kl_needs_swap(tiny_llama_dir):
    with pytest.raises(TrainingError, match="reference: swap"):
        TokenWeightedNPO(str(tiny_llama_dir), retain="kl")


def test_the_cache_needs_our_data_modules(tiny_llama_dir, tmp_path):
    loader = torch.utils.data.DataLoader([0, 1])
    with pytest.raises(TrainingError, match="data modules"):
        trainer(tmp_path).fit(MaskedDPO(str(tiny_llama_dir)), loader)
