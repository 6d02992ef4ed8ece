"""Reference log-probs: cached or by swapping, of the base and of a delta'd start."""

import json
import math

import numpy as np
import pytest
import torch

from lit_align.callbacks import KeyParameterLocalization
from lit_align.compact import AdapterSettings, apply_delta, export_delta
from lit_align.compact.state import links
from lit_align.data import PreferenceDataModule
from lit_align.errors import DataError, TrainingError
from lit_align.language_model import load_language_model
from lit_align.modules import MaskedDPO, TokenWeightedNPO
from tests.tiny_models import save_tiny_model, tiny_tokenizer
from tests.training_runs import (
    MemoryLogger,
    assert_close_weights,
    preference_rows,
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


def test_a_folder_goes_with_cache_alone(tiny_llama_dir):
    for reference in ("swap", "none"):
        with pytest.raises(TrainingError, match="reference_cache is the folder"):
            MaskedDPO(str(tiny_llama_dir), reference=reference, reference_cache="folder")
    with pytest.raises(TrainingError, match="choose one of cache, swap, none"):
        MaskedDPO(str(tiny_llama_dir), reference="nothing")


# ---- the folder that a run names -----------------------------------------------------------------


def cached(model, folder, **settings):
    return MaskedDPO(str(model), reference_cache=str(folder), **LEARN | settings)


def test_a_run_reads_what_another_kept(tiny_llama_dir, tmp_path, monkeypatch):
    rows = {"validation": preference_rows(3, seed=7)}
    first = fit(cached(tiny_llama_dir, tmp_path / "c"), preferences(6, splits=rows), tmp_path)

    def never(*args):
        raise AssertionError("computed again")

    monkeypatch.setattr("lit_align.modules.reference_logps.compute", never)
    again = fit(cached(tiny_llama_dir, tmp_path / "c"), preferences(6, splits=rows), tmp_path)
    assert again.values("loss") == first.values("loss")
    assert again.values("eval_loss") == first.values("eval_loss")


def test_a_folder_of_another_run_says_what_differs(tiny_llama_dir, mask_path, tmp_path):
    folder, template = tmp_path / "cache", tmp_path / "template.jinja"
    template.write_text("{{ messages }}")

    def data(**settings):
        return preferences(6, **{"chat_template": str(template), "layout": "padded"} | settings)

    first = cached(tiny_llama_dir, folder)
    fit(first, data(), tmp_path, mask_path)
    export_delta(first.model, tmp_path / "delta")
    kept = {p.name: p.read_bytes() for p in folder.iterdir()}
    same_name = tmp_path / "other.jinja"
    same_name.write_text("{{ messages }}")
    fit(cached(tiny_llama_dir, folder), data(chat_template=str(same_name)), tmp_path)
    template.write_text("{{ messages }} ")  # the file's name is as it was
    other_model = save_tiny_model(tmp_path / "other", seed=3)
    vocabulary = tiny_tokenizer()
    vocabulary.add_tokens(["a word more"])
    others = {
        "chat_template": (cached(tiny_llama_dir, folder), data(), {}),
        "truncation": (cached(tiny_llama_dir, folder), {"max_length": 99}, {}),
        "layout": (cached(tiny_llama_dir, folder), {"layout": "shared_prefix"}, {}),
        "tokenizer": (cached(tiny_llama_dir, folder), {"tokenizer": vocabulary}, {}),
        "precision": (cached(tiny_llama_dir, folder), {}, {"precision": "bf16-mixed"}),
        "delta": (cached(tiny_llama_dir, folder, delta=str(tmp_path / "delta")), {}, {}),
        "model": (cached(other_model, folder), {}, {}),
    }
    for what, (module, changed, settings) in others.items():
        if isinstance(changed, dict):
            changed = {"chat_template": "{{ messages }}"} | changed
            tokenizer = changed.pop("tokenizer", None)
            changed = data(**changed)
            changed.tokenizer_name = tokenizer or changed.tokenizer_name
        with pytest.raises(TrainingError, match=f"another run: {what} .*name another") as error:
            fit(module, changed, tmp_path, **settings)
        assert [w for w in others if f"{w} (" in str(error.value)] == [what]
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == kept


def test_a_run_that_failed_can_be_tried_again_with_its_mask(tiny_llama_dir, mask_path, tmp_path):
    fit(cached(tiny_llama_dir, tmp_path / "cache"), preferences(4), tmp_path)
    module = cached(tiny_llama_dir, tmp_path / "cache")
    for folder, fails in (("cache", True), ("cache", True), ("another", False)):
        module.hparams.reference_cache = str(tmp_path / folder)
        if fails:
            with pytest.raises(TrainingError, match="truncation"):
                fit(module, preferences(4, max_length=50), tmp_path, mask_path)
        else:
            fit(module, preferences(4, max_length=50), tmp_path, mask_path)
    assert module.mask is not None and module.trained_share() < 0.2


# ---- rows that come after training began ---------------------------------------------------------


def base_logps(folder, data, split):
    """Sums by (row, role) of the untrained model."""
    untrained = MaskedDPO(str(folder), reference="none")
    records = trainer(folder).predict(untrained, data)
    return {(r["row_id"], r["role"]): r["logp"] for batch in records for r in batch}


@pytest.mark.parametrize("trains", ["everything", "mask", "lora"])
def test_rows_that_come_after_training_have_their_reference(
    trains, tiny_llama_dir, mask_path, tmp_path
):
    splits = {"predict": preference_rows(5, seed=9), "test": preference_rows(3, seed=8)}
    rows = preferences(6, splits=dict(splits))
    adapter = AdapterSettings(rank=2, dropout=0.0) if trains == "lora" else None
    module = MaskedDPO(str(tiny_llama_dir), adapter=adapter, **LEARN)
    fit(module, rows, tmp_path, mask_path if trains == "mask" else None, max_epochs=2)
    trained = weights(module)
    (tested,) = trainer(tmp_path).test(module, rows, verbose=False)
    assert tested["test_loss"] != pytest.approx(math.log(2), abs=1e-5)
    records = [r for batch in trainer(tmp_path).predict(module, rows) for r in batch]
    expected = base_logps(tiny_llama_dir, preferences(1, splits=dict(splits)), "predict")
    found = {(r["row_id"], r["role"]): r["ref_logp"] for r in records}
    assert found == pytest.approx(expected, abs=1e-4) and len(found) == 10
    assert any(abs(r["logp"] - r["ref_logp"]) > 1e-3 for r in records)
    assert_close_weights(weights(module), trained, atol=0)


def test_validating_first_does_not_spare_the_train_rows_their_cache(tiny_llama_dir, tmp_path):
    rows = {"validation": preference_rows(3, seed=7)}
    at_once, after = (
        MaskedDPO(str(tiny_llama_dir), **LEARN),
        MaskedDPO(str(tiny_llama_dir), **LEARN),
    )
    data = preferences(6, splits=dict(rows))
    trainer(tmp_path).validate(after, data, verbose=False)
    losses = fit(after, data, tmp_path).values("loss")
    assert losses == fit(at_once, preferences(6, splits=rows), tmp_path).values("loss")


def test_swap_and_none_leave_anothers_log_probs_alone(tiny_llama_dir, mask_path, tmp_path):
    other = save_tiny_model(tmp_path / "other", seed=3)
    rows = preferences(2)
    fit(MaskedDPO(str(other), **LEARN), rows, tmp_path)  # its log-probs ride along now
    for reference in ("swap", "none"):
        settings = LEARN | {"reference": reference}
        here, fresh = (MaskedDPO(str(tiny_llama_dir), **settings) for _ in range(2))
        losses = fit(here, rows, tmp_path, mask_path).values("loss")
        assert losses == fit(fresh, preferences(2), tmp_path, mask_path).values("loss")


# ---- none ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("restricted", [False, True])
def test_reference_free_dpo_is_the_loss_of_the_policys_own_log_probs(
    restricted, tiny_llama_dir, mask_path, tmp_path
):
    module = MaskedDPO(str(tiny_llama_dir), reference="none", **LEARN)
    log = fit(module, preferences(4), tmp_path, mask_path if restricted else None)
    logps = base_logps(tiny_llama_dir, preferences(1, splits={"predict": preference_rows(4)}), "")
    margins = [logps[i, "chosen"] - logps[i, "rejected"] for i in range(4)]
    losses = [math.log1p(math.exp(-0.1 * margin)) for margin in margins]
    assert log.values("loss")[0] == pytest.approx(sum(losses) / 4, rel=1e-5)
    chosen = [0.1 * logps[i, "chosen"] for i in range(4)]
    assert log.values("rewards/chosen")[0] == pytest.approx(sum(chosen) / 4, rel=1e-5)
    (records,) = trainer(tmp_path).predict(
        module, preferences(1, splits={"predict": preference_rows(4)})
    )
    assert len(records) == 8 and all("ref_logp" not in r for r in records)
    assert all(link.state.base is None for link in links(module.model))  # nothing to swap in


@pytest.mark.parametrize("loss_type", ["token", "sequence"])
def test_reference_free_npo(loss_type, tiny_llama_dir, tmp_path):
    settings = LEARN | {"loss_type": loss_type, "retain": "nll"}
    module = TokenWeightedNPO(str(tiny_llama_dir), reference="none", **settings)
    log = fit(module, unlearning(6, batch_size=1), tmp_path)
    other = TokenWeightedNPO(str(tiny_llama_dir), **settings)
    data = unlearning(6, batch_size=1)
    data.setup("fit")
    zeros = [[np.zeros(len(s.response_ids)) for s in r.sequences] for r in data.rows("train")]
    data.attach_reference_logps("train", zeros)
    other._rows_served["train"] = data.rows("train")  # as if it had computed zeros
    assert log.values("loss") == fit(other, data, tmp_path).values("loss")


def test_gradient_scores_of_a_reference_free_loss(tiny_llama_dir, tmp_path):
    """At θ the gradient of DPO does not depend on θ_ref = θ; without a reference it does on θ."""
    masks = {}
    for reference in ("cache", "none"):
        found = KeyParameterLocalization("gradient", 0.1, num_batches=2)
        module = MaskedDPO(str(tiny_llama_dir), reference=reference, **LEARN)
        run = trainer(tmp_path / reference, callbacks=[found], max_steps=1)
        run.fit(module, preferences(8))
        masks[reference] = module.mask
    assert masks["cache"].digest != masks["none"].digest


def test_none_is_no_reference_for_a_kl(tiny_llama_dir):
    with pytest.raises(TrainingError, match="reference: swap"):
        TokenWeightedNPO(str(tiny_llama_dir), retain="kl", reference="none")


# ---- streamed rows -------------------------------------------------------------------------------


@pytest.fixture
def streamed(tmp_path):
    """A data module that streams the same pairs for every stage."""
    lines = [
        json.dumps({"prompt_ids": r.prompt, "chosen_ids": r.chosen, "rejected_ids": r.rejected})
        for r in preference_rows(4)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(lines))
    return PreferenceDataModule(
        tiny_tokenizer(), *[str(file)] * 4, streaming=True, batch_size=2, shuffle_buffer=0
    )


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("folder", [None, "cache"])
def test_streamed_rows_have_no_cache(stage, folder, streamed, tiny_llama_dir, tmp_path):
    module = MaskedDPO(str(tiny_llama_dir), reference_cache=folder)
    with pytest.raises(DataError, match="set reference: swap"):
        getattr(trainer(tmp_path, max_steps=1), stage)(module, streamed)


@pytest.mark.parametrize("reference", ["swap", "none"])
def test_streamed_rows_go_with_swap_and_none(
    reference, streamed, tiny_llama_dir, mask_path, tmp_path
):
    module = MaskedDPO(str(tiny_llama_dir), reference=reference, **LEARN)
    loss = fit(module, streamed, tmp_path, mask_path, max_steps=1).values("loss")[0]
    assert (loss == pytest.approx(math.log(2), abs=1e-6)) == (reference == "swap")
    for stage in ("validate", "test", "predict"):
        getattr(trainer(tmp_path), stage)(module, streamed)
