"""A NaN stops the run before it reaches a weight, and says where it came from."""

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align.callbacks import KeyParameterLocalization
from lit_align.errors import TrainingError
from lit_align.modules import MaskedDPO, SupervisedFineTuning
from tests.training_runs import (
    assert_equal_weights,
    instructions,
    preferences,
    random_mask,
    trainer,
    weights,
)

STEP = 2  # the step that goes wrong, counted from 0


class Snapshots(lightning.Callback):
    """The weights before each batch, and its rows."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = weights(pl_module)
        self.rows = sorted(set(batch.row_ids.tolist()))


def fit(module, tmp_path, data, **settings):
    random_mask().save(tmp_path / "mask")
    snapshots = Snapshots()
    saving = ModelCheckpoint(tmp_path / "kept", "{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [snapshots, saving, KeyParameterLocalization(mask=str(tmp_path / "mask"))]
    run = trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True, **settings)
    with pytest.raises(TrainingError) as error:
        run.fit(module, data)
    return snapshots, str(error.value)


class SpoiledLoss(MaskedDPO):
    """Its loss is `value` at one step."""

    value = float("nan")

    def objective(self, *args):
        out = super().objective(*args)
        if self.global_step == STEP:
            out.loss_sum = out.loss_sum + self.value
        return out


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_bad_loss_names_step_and_rows(value, accumulate, tiny_llama_dir, tmp_path):
    module = SpoiledLoss(str(tiny_llama_dir), learning_rate=1e-2)
    module.value = float(value)
    data = preferences(12, batch_size=2)
    snapshots, message = fit(module, tmp_path, data, accumulate_grad_batches=accumulate)
    assert f"loss is {value} at step {STEP}, rows {snapshots.rows}" in message
    assert_equal_weights(weights(module), snapshots.before)
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["step=1.ckpt", "step=2.ckpt"]
    state = torch.load(tmp_path / "kept" / "step=2.ckpt", weights_only=True)["state_dict"]
    assert all(t.isfinite().all() for t in state.values())


class SpoiledGradient(SupervisedFineTuning):
    """One parameter's gradient is NaN at one step."""

    def on_after_backward(self):
        if self.global_step == STEP:
            self.model.model.layers[1].mlp.down_proj.selected.grad[3] = torch.nan


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_bad_gradient_names_step_and_parameter(clip, tiny_llama_dir, tmp_path):
    module = SpoiledGradient(str(tiny_llama_dir), learning_rate=1e-2)
    data = instructions(12, batch_size=2)
    snapshots, message = fit(module, tmp_path, data, gradient_clip_val=clip)
    assert f"step {STEP}, first in language_model.model.layers.1.mlp.down_proj.selected" in message
    assert "(1 parameters)" in message
    assert_equal_weights(weights(module), snapshots.before)


def test_a_checkpoint_never_holds_what_is_not_finite(tiny_llama_dir, tmp_path):
    """The step itself leaves the range: neither its loss nor its gradient says so."""
    module = SupervisedFineTuning(str(tiny_llama_dir), learning_rate=1e-2, warmup_ratio=0.0)

    def on_before_optimizer_step(optimizer):
        type(module).on_before_optimizer_step(module, optimizer)
        if module.global_step == STEP:
            optimizer.param_groups[0]["lr"] = 1e300

    module.on_before_optimizer_step = on_before_optimizer_step
    _, message = fit(module, tmp_path, instructions(12, batch_size=2))
    assert f"not finite after step {STEP + 1}, first in model.embed_tokens.selected" in message
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["step=1.ckpt", "step=2.ckpt"]
