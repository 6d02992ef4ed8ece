"""Training on a GPU: what a CPU gives, checkpoints that go from one to the other, every mode."""

import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align.callbacks import KeyParameterLocalization
from lit_align.modules import ILAMaskLearning, MaskedDPO, SupervisedFineTuning, TokenWeightedNPO
from tests.modules.test_ila_mask_learning import make_change
from tests.tiny_models import save_tiny_model
from tests.training_runs import (
    MemoryLogger,
    assert_close_weights,
    assert_equal_weights,
    instructions,
    preferences,
    random_mask,
    stored,
    trainer,
    unlearning,
    weights,
)

KINDS = {
    "sft": (SupervisedFineTuning, instructions),
    "dpo": (MaskedDPO, preferences),
    "npo": (TokenWeightedNPO, unlearning),
}


@pytest.fixture(scope="module")
def wide_llama_dir(tmp_path_factory):
    """Its heads are as wide as FlexAttention's kernels take them."""
    return save_tiny_model(tmp_path_factory.mktemp("wide") / "llama", "wide_llama")


def fit(kind, model, folder, accelerator="gpu", mask=None, rows=10, precision="32-true", **more):
    """(module, losses) of two epochs; eps lets gradients that are almost 0 not decide by sign."""
    folder.mkdir(exist_ok=True)
    run = {n: more.pop(n) for n in ("ckpt_path", "callbacks", "max_epochs", "log") if n in more}
    data = {n: more.pop(n) for n in ("layout",) if n in more}
    module_kind, rows_of = KINDS[kind]
    module = module_kind(str(model), learning_rate=1e-2, weight_decay=0.1, eps=1e-3, **more)
    log, callbacks = MemoryLogger(), list(run.get("callbacks", ()))
    if mask is not None:
        mask.save(folder / "mask")
        callbacks.append(KeyParameterLocalization(mask=str(folder / "mask")))
    fitted = trainer(
        folder, accelerator=accelerator, precision=precision, logger=log, callbacks=callbacks,
        log_every_n_steps=run.get("log", 1), max_epochs=run.get("max_epochs", 2),
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        gradient_clip_val=1.0,
    )  # fmt: skip
    fitted.fit(module, rows_of(rows, **data), ckpt_path=run.get("ckpt_path"))
    losses = log.values("loss")
    assert losses and all(map(math.isfinite, losses))
    return module, losses


@pytest.mark.parametrize("log", [1, 1000], ids=["two passes", "one pass"])
@pytest.mark.parametrize("granularity", ["element", "row"])
@pytest.mark.parametrize("kind", KINDS)
def test_fp32_is_the_cpu_s(kind, granularity, log, tiny_llama_dir, tmp_path):
    mask = random_mask(0.1, granularity)
    found = {}
    for accelerator in ("cpu", "gpu"):
        module, losses = fit(
            kind, tiny_llama_dir, tmp_path / accelerator, accelerator, mask, log=log
        )
        found[accelerator] = weights(module), losses
    assert found["gpu"][1] == pytest.approx(found["cpu"][1], rel=1e-4, abs=1e-5)
    assert_close_weights(found["gpu"][0], found["cpu"][0], atol=1e-4)


# (checkpointing, layout, reference, precision): each beside each of another kind
MODES = [
    (False, "padded", "cache", "32-true"),
    (False, "shared_prefix", "swap", "bf16-mixed"),
    (False, "shared_prefix", "cache", "bf16-true"),
    (True, "padded", "swap", "bf16-mixed"),
    (True, "shared_prefix", "cache", "32-true"),
    (True, "padded", "cache", "bf16-true"),
    ("selective", "padded", "cache", "bf16-mixed"),
    ("selective", "shared_prefix", "swap", "bf16-true"),
    ("selective", "shared_prefix", "cache", "32-true"),
]


@pytest.mark.parametrize(("checkpointing", "layout", "reference", "precision"), MODES)
def test_every_mode(checkpointing, layout, reference, precision, wide_llama_dir, tmp_path):
    mask = random_mask(0.1, "element", kind="wide_llama")
    module, _ = fit(
        "dpo", wide_llama_dir, tmp_path, mask=mask, precision=precision, reference=reference,
        gradient_checkpointing=checkpointing, layout=layout, max_epochs=1,
    )  # fmt: skip
    after = weights(module)
    for name, base in stored(wide_llama_dir).items():
        unselected = ~mask.dense(name)
        assert torch.equal(after[name][unselected], base.to(after[name].dtype)[unselected]), name


@pytest.mark.parametrize("ways", [("gpu", "cpu"), ("cpu", "gpu")], ids="-".join)
def test_a_checkpoint_goes_on_elsewhere(ways, tiny_llama_dir, tmp_path):
    """Half of a run here and half there is the whole run."""
    mask, first, second = random_mask(0.1), *ways
    saving = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
    whole, _ = fit("dpo", tiny_llama_dir, tmp_path / "whole", first, mask, callbacks=[saving])
    resumed, _ = fit(
        "dpo", tiny_llama_dir, tmp_path / "resumed", second, mask,
        ckpt_path=tmp_path / "saved" / "step=2.ckpt",
    )  # fmt: skip
    assert_close_weights(weights(resumed), weights(whole), atol=1e-4)


def test_the_reference_cache_is_read_again(tiny_llama_dir, tmp_path):
    found = [
        fit("dpo", tiny_llama_dir, tmp_path / str(i), mask=random_mask(0.1),
            reference_cache=str(tmp_path / "cache"))
        for i in range(2)
    ]  # fmt: skip
    assert_equal_weights(weights(found[0][0]), weights(found[1][0]))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_gates_are_learned(kind, precision, tiny_llama_dir, tmp_path):
    change = make_change(tiny_llama_dir, tmp_path / "change", kind)
    scores = {}
    for accelerator in ("cpu", "gpu"):
        module = ILAMaskLearning(str(tiny_llama_dir), change, learning_rate=50.0)
        run = trainer(tmp_path / accelerator, accelerator=accelerator, precision=precision)
        run.fit(module, instructions(8))
        scores[accelerator] = module.gates.scores()
    assert any(abs(score - 4.0) > 1e-3 for score in scores["gpu"].values())
    allowed = 1e-4 if precision == "32-true" else 0.1
    assert scores["gpu"] == pytest.approx(scores["cpu"], abs=allowed)


def test_without_masters(tiny_llama_dir, tmp_path):
    module, _ = fit(
        "sft", tiny_llama_dir, tmp_path, mask=random_mask(0.3), precision="bf16-true",
        stochastic_rounding=True,
    )  # fmt: skip
    trained = [p for p in module.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.bfloat16}
    assert {p.device.type for p in trained} == {"cuda"}
