"""The masks that runs bring or make, against brute force."""

import pytest
import torch
import torch.nn.functional as F

from lit_align.callbacks import KeyParameterLocalization, key_parameters
from lit_align.compact import export_delta, links
from lit_align.errors import LocalizationError, MaskError
from lit_align.language_model import load_language_model
from lit_align.localizers import HeadDistance, head_distance_scores, magnitude_scores
from lit_align.masks import ParameterMask, select
from lit_align.modules import MaskedDPO, SupervisedFineTuning, TokenWeightedNPO
from tests.attention_models import save_pair
from tests.tiny_models import save_tiny_model
from tests.training_runs import (
    assert_equal_weights,
    instructions,
    preferences,
    random_mask,
    stored,
    trainer,
    unlearning,
    weights,
)

LEARN = {"learning_rate": 1e-2, "warmup_ratio": 0.0}


def fit(module, data, tmp_path, *callbacks, **settings):
    run = trainer(tmp_path, callbacks=list(callbacks), **settings)
    run.fit(module, data)
    return module


def test_a_mask_is_loaded(tiny_llama_dir, tmp_path):
    random_mask().save(tmp_path / "given")
    callback = KeyParameterLocalization(mask=str(tmp_path / "given"))
    module = fit(MaskedDPO(str(tiny_llama_dir), **LEARN), preferences(4), tmp_path, callback)
    assert module.mask == random_mask()
    assert sum(p.numel() for p in module.model.parameters() if p.requires_grad) == (
        random_mask().count()
    )
    assert not (tmp_path / "mask.safetensors").exists()


def test_masks_of_the_weights_alone(tiny_llama_dir, tmp_path):
    model, _ = load_language_model(tiny_llama_dir)
    scores = magnitude_scores(model)
    for name, settings in {"element": {}, "row": {"granularity": "row", "ratio": 0.2}}.items():
        path = str(tmp_path / name)
        callback = KeyParameterLocalization("magnitude", output=path, **settings)
        module = fit(MaskedDPO(str(tiny_llama_dir), **LEARN), preferences(4), tmp_path, callback)
        expected = select(
            scores, settings.get("ratio", 0.1), granularity=settings.get("granularity", "element")
        )
        assert ParameterMask.load(path) == module.mask == expected
        assert module.mask.metadata.base_fingerprint == model.base_fingerprint
        assert module.mask.metadata.method == "magnitude"


def test_random_masks_depend_on_the_seed_alone(tiny_llama_dir, tmp_path):
    masks = []
    for i, seed in enumerate((0, 0, 1)):
        callback = KeyParameterLocalization("random", seed=seed, output=str(tmp_path / str(i)))
        module = fit(MaskedDPO(str(tiny_llama_dir), **LEARN), preferences(4), tmp_path, callback)
        masks.append(module.mask)
    assert masks[0] == masks[1] and masks[0].jaccard(masks[2]) < 0.2


# ---- gradient ------------------------------------------------------------------------------------


def dense_logps(model, batch) -> torch.Tensor:
    """(S,) sums over responses from the model's whole logits, one sequence at a time."""
    sums = []
    for s in range(batch.num_sequences):
        at = batch.sequence_index == s
        logits = model(
            input_ids=batch.input_ids[s : s + 1], attention_mask=batch.attention_mask[s : s + 1]
        ).logits.flatten(0, 1)
        hidden = batch.hidden_index[at] - s * batch.input_ids.shape[1]
        logps = logits[hidden].log_softmax(-1)
        chosen = logps.gather(1, batch.target_ids[at][:, None])[:, 0]
        sums.append((chosen * batch.token_weights[at]).sum())
    return torch.stack(sums)


def loss_by_hand(kind, model, batch) -> torch.Tensor:
    if kind is SupervisedFineTuning:
        return -dense_logps(model, batch).sum()
    logps = dense_logps(model, batch)
    if kind is MaskedDPO:
        margins = logps[0::2] - logps[1::2]
        return -F.logsigmoid(0.1 * (margins - margins.detach())).sum()
    # At θ, −logσ(−βΔ) has the gradient β/2 times that of the log-prob.
    return (0.05 * logps * (batch.sequence_roles == 1)).sum()


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (MaskedDPO, preferences),
        (SupervisedFineTuning, instructions),
        (TokenWeightedNPO, unlearning),
    ],
)
def test_gradient_scores_are_the_sum_over_the_first_batches(
    kind, data, tiny_llama_dir, tmp_path, monkeypatch
):
    seen = {}

    def keep(model):
        seen.update({n: p.grad.clone() for n, p in model.named_parameters()})
        return {n: g.abs() for n, g in seen.items()}

    monkeypatch.setattr(key_parameters, "gradient_scores", keep)
    rows = data(10, batch_size=3)
    callback = KeyParameterLocalization("gradient", num_batches=2)
    module = fit(kind(str(tiny_llama_dir), **LEARN), rows, tmp_path, callback)

    model, _ = load_language_model(tiny_llama_dir)
    padded = data(10, batch_size=3, layout="padded")
    padded.setup("fit")
    batches = list(padded.train_dataloader())[:2]
    sum(loss_by_hand(kind, model, batch) for batch in batches).backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    for name, grad in expected.items():
        torch.testing.assert_close(seen[name], grad, rtol=1e-3, atol=1e-6, msg=name)
    by_hand = select({n: g.abs() for n, g in expected.items()}, 0.1)
    assert module.mask.jaccard(by_hand) > 0.98  # rounding moves a few near the threshold
    assert module.mask == select({n: g.abs() for n, g in seen.items()}, 0.1)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_gradient_localisation_in_bf16_is_near_fp32(precision, tiny_llama_dir, tmp_path):
    masks = []
    for each in ("32-true", precision):
        callback = KeyParameterLocalization("gradient", output=str(tmp_path / each))
        module = MaskedDPO(str(tiny_llama_dir), **LEARN)
        masks.append(fit(module, preferences(8), tmp_path, callback, precision=each).mask)
    assert masks[0].jaccard(masks[1]) > 0.8


def test_localisation_leaves_no_gradient_and_trains_on(tiny_llama_dir, tmp_path):
    module = MaskedDPO(str(tiny_llama_dir), **LEARN)
    run = trainer(tmp_path, callbacks=[KeyParameterLocalization("gradient")], max_steps=0)
    run.fit(module, preferences(8))
    assert all(p.grad is None for p in module.model.parameters())
    assert_equal_weights(weights(module), load_language_model(tiny_llama_dir)[0].state_dict())


def test_a_mask_of_equal_inputs_is_read_again(tiny_llama_dir, tmp_path, monkeypatch):
    """So a resumed run goes on with its own mask."""

    def run(rows=8, ratio=0.1, **settings):
        callback = KeyParameterLocalization("gradient", ratio)
        module = MaskedDPO(str(tiny_llama_dir), **LEARN | settings)
        return fit(module, preferences(rows), tmp_path, callback).mask

    def never(*args):
        raise AssertionError("computed again")

    first = run()
    with monkeypatch.context() as patch:
        patch.setattr(key_parameters, "_accumulate_gradients", never)
        assert run() == first
        for other in ({"rows": 7}, {"ratio": 0.2}, {"beta": 0.5}):
            with pytest.raises(AssertionError, match="again"):
                run(**other)
    assert run(rows=7) != first
    assert ParameterMask.load(tmp_path / "mask.safetensors") != first


def test_further_masks_are_nested(tiny_llama_dir, tmp_path):
    also = {str(tmp_path / "n1"): 0.05, str(tmp_path / "wide"): 0.3}
    callback = KeyParameterLocalization("gradient", 0.1, also=also)
    module = fit(MaskedDPO(str(tiny_llama_dir), **LEARN), preferences(8), tmp_path, callback)
    n1, wide = ParameterMask.load(tmp_path / "n1"), ParameterMask.load(tmp_path / "wide")
    assert n1 & module.mask == n1 and module.mask & wide == module.mask
    assert n1.density() == pytest.approx(0.05, abs=1e-4)
    assert wide.density() == pytest.approx(0.3, abs=1e-4)


# ---- weight change -------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["element", "row"])
def test_weight_change_equals_brute_force(granularity, tiny_llama_dir, tmp_path):
    also = {str(tmp_path / "n1"): 0.05}
    callback = KeyParameterLocalization("weight_change", 0.1, granularity, also=also)
    module = fit(MaskedDPO(str(tiny_llama_dir), **LEARN), preferences(8), tmp_path, callback)
    assert module.mask is None  # the run itself trains everything
    base = stored(tiny_llama_dir)
    scores = {n: (p.detach() - base[n]).abs() for n, p in module.model.named_parameters()}
    found = ParameterMask.load(tmp_path / "mask.safetensors")
    assert found == select(scores, 0.1, granularity=granularity)
    assert ParameterMask.load(tmp_path / "n1") == select(scores, 0.05, granularity=granularity)
    assert found.metadata.base_fingerprint == module.model.base_fingerprint


def test_weight_change_of_a_bf16_run_is_read_from_the_masters(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    module = MaskedDPO(str(base), learning_rate=1e-6, warmup_ratio=0.0)
    callback = KeyParameterLocalization("weight_change")
    fit(module, preferences(8), tmp_path, callback, precision="bf16-true")
    scores = {
        link.state.name: (link.selected.detach().view(link.weight.shape) - stored(base)[name]).abs()
        for link in links(module.model)
        for name in [link.state.name]
    }
    found = ParameterMask.load(tmp_path / "mask.safetensors")
    assert found == select({n: scores[n] for n in found.selections}, 0.1)


# ---- head distance -------------------------------------------------------------------------------


def test_head_distance_trains_the_chosen_heads_alone(tmp_path):
    base, task, *_ = save_pair(tmp_path, "gqa")
    heads = HeadDistance("qkv", "euclidean_distance", others="freeze")
    also = {str(tmp_path / "more"): 0.5}
    callback = KeyParameterLocalization(
        "head_distance", 0.25, trained=str(task), heads=heads, also=also
    )
    module = fit(SupervisedFineTuning(str(base), **LEARN), instructions(8), tmp_path, callback)
    scores = head_distance_scores(base, task, "qkv", "euclidean_distance")
    assert module.mask == heads.select(base, task, scores, 0.25)
    assert ParameterMask.load(tmp_path / "mask.safetensors") == module.mask
    assert ParameterMask.load(tmp_path / "more") == heads.select(base, task, scores, 0.5)
    before = stored(base)
    for name, weight in weights(module).items():
        if name not in before:  # a tied head
            continue
        moved = weight != before[name]
        selected = module.mask.dense(name)
        assert not moved[~selected].any(), name
        assert moved[selected].float().mean() > 0.9 or not selected.any(), name


def test_heads_of_a_run_with_a_delta_or_of_a_copy_are_refused(tmp_path):
    base, task, model, _ = save_pair(tmp_path, "gqa")
    with pytest.raises(LocalizationError, match="above zero"):
        callback = KeyParameterLocalization("head_distance", trained=str(base))
        fit(SupervisedFineTuning(str(base)), instructions(4), tmp_path, callback)
    model.base_fingerprint = load_language_model(base)[0].base_fingerprint
    everything = ParameterMask.full(model, base_fingerprint=model.base_fingerprint)
    export_delta(model, tmp_path / "delta", everything)
    module = SupervisedFineTuning(str(base), delta=str(tmp_path / "delta"))
    with pytest.raises(LocalizationError, match="starts from a delta"):
        callback = KeyParameterLocalization("head_distance", trained=str(task))
        fit(module, instructions(4), tmp_path, callback)


@pytest.mark.parametrize(
    "given",
    [
        {"method": "head_distance"},
        {"method": "random", "trained": "task"},
        {"method": "random", "heads": HeadDistance()},
        {"method": "head_distance", "trained": "task", "granularity": "row"},
        {"method": "head_distance", "trained": "task", "scope": "per_parameter"},
    ],
)
def test_settings_of_head_distance_go_with_it(given):
    with pytest.raises(LocalizationError, match="head_distance"):
        KeyParameterLocalization(**given)


# ---- errors --------------------------------------------------------------------------------------


def test_either_a_mask_or_a_method():
    for given in ({}, {"mask": "m", "method": "random"}):
        with pytest.raises(LocalizationError, match="either"):
            KeyParameterLocalization(**given)


def test_a_damaged_mask_stops_the_run(tiny_llama_dir, tmp_path):
    random_mask().save(tmp_path / "given")
    (tmp_path / "given").write_bytes((tmp_path / "given").read_bytes()[:-9])
    callback = KeyParameterLocalization(mask=str(tmp_path / "given"))
    with pytest.raises(MaskError, match="given"):
        fit(MaskedDPO(str(tiny_llama_dir)), preferences(4), tmp_path, callback)


def test_another_models_mask_stops_the_run(tiny_llama_dir, tmp_path):
    random_mask(kind="gpt2").save(tmp_path / "given")
    callback = KeyParameterLocalization(mask=str(tmp_path / "given"))
    with pytest.raises(MaskError, match=r"transformer\.wte\.weight"):
        fit(MaskedDPO(str(tiny_llama_dir)), preferences(4), tmp_path, callback)


def test_gradient_needs_a_data_module(tiny_llama_dir, tmp_path):
    data = instructions(4)
    data.setup("fit")
    run = trainer(tmp_path, callbacks=[KeyParameterLocalization("gradient")])
    with pytest.raises(LocalizationError, match="data module"):
        run.fit(SupervisedFineTuning(str(tiny_llama_dir)), data.train_dataloader())


def test_weight_change_needs_a_full_fit(tiny_llama_dir, tmp_path):
    random_mask().save(tmp_path / "given")
    callbacks = [
        KeyParameterLocalization(mask=str(tmp_path / "given")),
        KeyParameterLocalization("weight_change"),
    ]
    with pytest.raises(LocalizationError, match="full fit"):
        fit(MaskedDPO(str(tiny_llama_dir), **LEARN), preferences(4), tmp_path, *callbacks)


def test_weight_change_where_nothing_moved(tiny_llama_dir, tmp_path):
    module = MaskedDPO(str(tiny_llama_dir), learning_rate=0.0)
    with pytest.raises(LocalizationError, match="32-true"):
        fit(module, preferences(4), tmp_path, KeyParameterLocalization("weight_change"))


def test_weight_change_of_a_run_that_starts_from_a_delta_is_refused(tiny_llama_dir, tmp_path):
    model, _ = load_language_model(tiny_llama_dir)
    export_delta(model, tmp_path / "delta", random_mask())
    module = SupervisedFineTuning(str(tiny_llama_dir), delta=str(tmp_path / "delta"))
    with pytest.raises(LocalizationError, match="starts from a delta"):
        fit(module, instructions(4), tmp_path, KeyParameterLocalization("weight_change"))
