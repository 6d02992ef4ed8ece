"""ILA's stage 2 under Lightning: what it minimises, from what, and what it writes."""

import math
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align.callbacks import KeyParameterLocalization
from lit_align.compact import AdapterSettings, add_adapters, trainable
from lit_align.compact.change import read_change, save_change
from lit_align.compact.gates import gate
from lit_align.errors import LocalizationError, TrainingError
from lit_align.language_model import load_language_model
from lit_align.localizers.layer_gate import read_scores
from lit_align.masks import ParameterMask
from lit_align.masks.linear_layers import linear_layers
from lit_align.modules import ILAMaskLearning, MaskedDPO, SupervisedFineTuning
from lit_align.modules.forward import per_token_logps
from tests.tiny_models import save_tiny_model
from tests.training_runs import (
    MemoryLogger,
    instructions,
    preferences,
    trainer,
)


@torch.no_grad()
def make_change(base, folder, kind="full"):
    """A change folder as stage 1 leaves it."""
    model = load_language_model(base)[0]
    if kind == "lora":
        add_adapters(model, AdapterSettings(rank=4, alpha=8))
    g = torch.Generator().manual_seed(4)
    for _, parameter in trainable(model):
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=g))
    return str(save_change(model, folder))


@pytest.fixture(scope="module")
def changes(tiny_llama_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("changes")
    return {kind: make_change(tiny_llama_dir, folder / kind, kind) for kind in ("full", "lora")}


def learn(model, change, data, folder, *, callbacks=(), fit=None, **settings):
    run = {n: settings.pop(n) for n in list(settings) if n in RUN}
    module = ILAMaskLearning(str(model), change, **settings)
    log = MemoryLogger()
    t = trainer(folder, logger=log, log_every_n_steps=1, callbacks=list(callbacks), **run)
    t.fit(module, data, **fit or {})
    return module, log


RUN = ("max_epochs", "max_steps", "precision", "accumulate_grad_batches", "enable_checkpointing",
       "gradient_clip_val")  # fmt: skip


def mean_loss_gradient(base, change, batches):
    """d mean loss / ds at s_0 = 4, over all target tokens of the batches; by plain autograd."""
    model = load_language_model(base)[0]
    gates = gate(model, read_change(change, model))
    logps = torch.cat([per_token_logps(model, batch) for batch in batches])
    scores = gates.parameters()
    found = torch.autograd.grad(-logps.mean(), list(scores.values()))
    return dict(zip(scores, map(float, found), strict=True))


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_step_of_gradient_descent_on_the_mean_over_the_window(
    kind, accumulate, tiny_llama_dir, changes, tmp_path
):
    module, _ = learn(
        tiny_llama_dir, changes[kind], instructions(8), tmp_path, max_steps=1, learning_rate=50.0,
        accumulate_grad_batches=accumulate,
    )  # fmt: skip
    loader = instructions(8)
    loader.setup("fit")
    batches = list(loader.train_dataloader())[:accumulate]
    grads = mean_loss_gradient(tiny_llama_dir, changes[kind], batches)
    expected = {name: 4.0 - 50.0 * grad for name, grad in grads.items()}
    assert module.gates.scores() == pytest.approx(expected, abs=2e-6)
    assert max(abs(4.0 - s) for s in expected.values()) > 1e-3


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_cache_and_swap_are_equal(kind, tiny_llama_dir, changes, tmp_path):
    """The base is the reference, also in its norms: γ = 0 gives its log-probs."""
    found = []
    for reference in ("cache", "swap"):
        module, log = learn(
            tiny_llama_dir, changes[kind], preferences(8), tmp_path / reference, loss="dpo",
            reference=reference, max_epochs=2,
        )  # fmt: skip
        found.append((log.values("loss"), log.values("rewards/margins"), module.gates.scores()))
    for a, b in zip(*found, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    losses, margins, scores = found[0]
    assert all(abs(loss - math.log(2)) > 1e-5 for loss in losses)  # θ_0 + γΔθ is not θ_0
    assert max(abs(s - 4.0) for s in scores.values()) > 1e-4 and any(margins)


def test_dpo_against_the_module_that_trains_weights(tiny_llama_dir, changes, tmp_path):
    """With s_0 = 40 (γ = 1) the first loss is that of the fine-tuned model under MaskedDPO."""
    _, log = learn(
        tiny_llama_dir, changes["full"], preferences(4), tmp_path, loss="dpo", beta=0.3,
        initial_score=40.0, max_steps=1,
    )  # fmt: skip
    rows = preferences(4)
    module = MaskedDPO("unused", beta=0.3)
    tuned = load_language_model(tiny_llama_dir)[0]
    change = read_change(changes["full"], tuned)
    rows.setup("fit")
    (batch,) = list(rows.train_dataloader())
    with torch.no_grad():
        reference = per_token_logps(tuned, batch)
        parameters = dict(tuned.named_parameters())
        for name, delta in change.layers.items():
            parameters[name].add_(delta)
        for name, values in change.others.items():
            parameters[name].copy_(values)
        objective = module.objective(batch, per_token_logps(tuned, batch), reference)
    expected = float(objective.loss_sum / objective.units)
    assert log.values("loss")[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_precisions(precision, tiny_llama_dir, changes, tmp_path):
    module, log = learn(
        tiny_llama_dir, changes["full"], instructions(8), tmp_path, max_epochs=2,
        precision=precision, gradient_checkpointing=True, gradient_clip_val=1.0,
    )  # fmt: skip
    assert {p.dtype for _, p in trainable(module.model)} == {torch.float32}
    exact, _ = learn(tiny_llama_dir, changes["full"], instructions(8), tmp_path, max_epochs=2)
    found = torch.tensor(list(module.gates.scores().values())) - 4.0
    expected = torch.tensor(list(exact.gates.scores().values())) - 4.0
    similarity = torch.nn.functional.cosine_similarity(found, expected, dim=0)
    assert similarity > (0.9999 if precision == "32-true" else 0.97)
    assert all(math.isfinite(loss) for loss in log.values("loss"))


def test_what_is_written(tiny_llama_dir, changes, tmp_path):
    module, log = learn(tiny_llama_dir, changes["lora"], instructions(8), tmp_path, max_epochs=2)
    scores = read_scores(tmp_path / "scores.json")
    assert scores == module.layer_scores()
    assert list(scores.layers) == list(linear_layers(load_language_model(tiny_llama_dir)[0]))
    assert scores.base_fingerprint == module.model.base_fingerprint
    assert (scores.loss, scores.steps, scores.change) == ("sft", 4, changes["lora"])
    assert scores.unscored == () and scores.ties == 0 and scores.spread > 1e-3
    assert not scores.saturated
    assert scores.extra["optimizer"] == "gradient_descent"
    assert log.values("mask/density")[0] == pytest.approx(15 / 29344)


def test_more_loss_without_a_layer_means_a_higher_score(tmp_path):
    """A change that was trained: the layer whose change helps most ends above the others."""
    base = save_tiny_model(tmp_path / "base")
    rows = instructions(8, batch_size=8)
    module = SupervisedFineTuning(str(base), learning_rate=1e-2, lr_scheduler="constant")
    trainer(tmp_path, max_epochs=15).fit(module, rows)
    change = str(save_change(module.model, tmp_path / "change"))
    learned, log = learn(base, change, instructions(8, batch_size=8), tmp_path, max_epochs=15)
    assert log.values("loss")[-1] < log.values("loss")[0]
    scores = learned.gates.scores()
    rows.setup("fit")
    (batch,) = list(rows.train_dataloader())
    without = {}
    parameters = learned.gates.parameters()
    with torch.no_grad():
        for name in scores:
            for other, score in parameters.items():
                score.fill_(-50.0 if other == name else 50.0)
            without[name] = -float(per_token_logps(learned.model, batch).mean())
    order = [sorted(found, key=found.get) for found in (scores, without)]
    ranks = [torch.tensor([o.index(n) for n in scores]).float() for o in order]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.6
    assert order[0][-1] in order[1][-3:]


def test_the_budget_pushes_all_gates_down(tiny_llama_dir, changes, tmp_path):
    """A penalty w·max(0, mean γ − H), worth w·σ'/layers for each score and step."""
    runs = {}
    for name, settings in {
        "none": {}, "slack": {"budget": 0.99, "budget_weight": 7.0},
        "tight": {"budget": 0.5, "budget_weight": 7.0},
    }.items():  # fmt: skip
        module, _ = learn(
            tiny_llama_dir, changes["full"], instructions(8), tmp_path, max_steps=1,
            learning_rate=1.0, accumulate_grad_batches=2, **settings,
        )  # fmt: skip
        runs[name] = torch.tensor(list(module.gates.scores().values()))
    assert torch.equal(runs["slack"], runs["none"])
    slope = 7.0 * torch.sigmoid(torch.tensor(4.0)) * torch.sigmoid(torch.tensor(-4.0)) / 15
    torch.testing.assert_close(runs["none"] - runs["tight"], slope.expand(15), rtol=0, atol=2e-6)


def test_a_dataset_smaller_than_one_batch(tiny_llama_dir, changes, tmp_path):
    data = instructions(2, batch_size=16)
    module, _ = learn(tiny_llama_dir, changes["lora"], data, tmp_path, max_steps=3, max_epochs=-1)
    assert module.global_step == 3
    assert read_scores(tmp_path / "scores.json").spread > 0


def test_gates_that_all_saturate_are_said_so(tiny_llama_dir, changes, tmp_path):
    with pytest.warns(UserWarning, match="all 15 gates are within 0.01 of 0 or 1 after 1 steps"):
        learn(
            tiny_llama_dir, changes["full"], instructions(4), tmp_path, max_steps=1,
            initial_score=9.0,
        )  # fmt: skip
    assert read_scores(tmp_path / "scores.json").saturated
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="all .* gates")
        learn(tiny_llama_dir, changes["full"], instructions(4), tmp_path, max_steps=1)


def test_resuming_gives_the_same_scores(tiny_llama_dir, changes, tmp_path):
    def saving(folder):
        return ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)

    settings = {"loss": "dpo", "max_epochs": 2, "enable_checkpointing": True}
    whole, _ = learn(
        tiny_llama_dir, changes["full"], preferences(8), tmp_path / "a",
        callbacks=[saving(tmp_path / "a")], **settings,
    )  # fmt: skip
    checkpoint = str(tmp_path / "a" / "step=3.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert len(state) == 15 and all(tensor.shape == () for tensor in state.values())
    resumed, _ = learn(
        tiny_llama_dir, changes["full"], preferences(8), tmp_path / "b",
        callbacks=[saving(tmp_path / "b")], fit={"ckpt_path": checkpoint}, **settings,
    )  # fmt: skip
    assert resumed.gates.scores() == whole.gates.scores()
    with pytest.raises(TrainingError, match=r"has change .* belongs to another run"):
        learn(
            tiny_llama_dir, changes["lora"], preferences(8), tmp_path / "c",
            fit={"ckpt_path": checkpoint}, **settings,
        )  # fmt: skip


def test_adamw_moves_every_score_by_the_learning_rate(tiny_llama_dir, changes, tmp_path):
    module, _ = learn(
        tiny_llama_dir, changes["full"], instructions(4), tmp_path, max_steps=1, optimizer="adamw"
    )
    moved = [abs(s - 4.0) for s in module.gates.scores().values()]
    assert moved == pytest.approx([0.05] * 15, rel=1e-2)
    assert module.hparams["learning_rate"] == 0.05


def test_masks_come_through_the_one_callback(tiny_llama_dir, changes, tmp_path):
    further = str(tmp_path / "further.safetensors")
    callback = KeyParameterLocalization("layer_gate", 0.3, also={further: 0.1})
    module, _ = learn(
        tiny_llama_dir, changes["full"], instructions(8), tmp_path, callbacks=[callback]
    )
    ranking = module.layer_scores().ranking()
    chosen = {}
    for path in (tmp_path / "mask.safetensors", further):
        mask = ParameterMask.load(path)
        mask.check_matches(load_language_model(tiny_llama_dir)[0], module.model.base_fingerprint)
        assert mask.metadata.granularity == "layer"
        chosen[path] = {n for n, s in mask.selections.items() if s.kind == "all"}
    assert chosen[tmp_path / "mask.safetensors"] == set(ranking[:5])  # ceil(0.3 · 15)
    assert chosen[further] == set(ranking[:2])
    # The file of scores gives any other run the same mask, here of the layers to freeze.
    scores = str(tmp_path / "scores.json")
    callback = KeyParameterLocalization("layer_gate", 0.3, scores=scores, lowest=True)
    tuning = SupervisedFineTuning(str(tiny_llama_dir), learning_rate=1e-2)
    trainer(tmp_path / "tune", callbacks=[callback]).fit(tuning, instructions(4))
    assert {n for n, _ in trainable(tuning.model)} == set(ranking[-5:])
    assert ParameterMask.load(tmp_path / "tune" / "mask.safetensors") == tuning.mask


def test_settings_of_the_callback_that_contradict(tiny_llama_dir, changes, tmp_path):
    with pytest.raises(LocalizationError, match="settings of the method layer_gate"):
        KeyParameterLocalization("random", scores="scores.json")
    with pytest.raises(LocalizationError, match="layer_gate ranks layers, not granularity 'row'"):
        KeyParameterLocalization("layer_gate", granularity="row")
    learn(tiny_llama_dir, changes["full"], instructions(4), tmp_path, max_steps=1)
    scores = str(tmp_path / "scores.json")
    tuning = SupervisedFineTuning(str(tiny_llama_dir))
    with pytest.raises(LocalizationError, match="name the file in scores"):
        trainer(tmp_path, callbacks=[KeyParameterLocalization("layer_gate")]).fit(
            tuning, instructions(4)
        )
    for callback, error in (
        (KeyParameterLocalization("layer_gate", scores=scores), LocalizationError),
        (KeyParameterLocalization("random"), TrainingError),
    ):
        with pytest.raises(error, match=r"leave scores out here|takes no mask"):
            learn(tiny_llama_dir, changes["full"], instructions(4), tmp_path, callbacks=[callback])


def test_settings_that_cannot_be(changes):
    for settings, message in (
        ({"loss": "npo"}, "loss 'npo': choose one of sft, dpo"),
        ({"optimizer": "sgd"}, "optimizer 'sgd'"),
        ({"budget": 1.5}, r"budget 1.5 is a share of the layers"),
        ({"initial_score": math.inf}, "initial_score inf must be finite"),
        ({"budget": 0.5, "budget_weight": -1.0}, "budget_weight -1.0 >= 0"),
        ({"weight_decay": 0.1}, "weight_decay is AdamW's"),
        ({"adapter": AdapterSettings()}, "give the adapters' folder as change"),
    ):
        with pytest.raises(TrainingError, match=message):
            ILAMaskLearning("x", changes["full"], **settings)
