"""A checkpoint taken at any moment, by any callback, resumes exactly."""

import os
import signal

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
)

from lit_align.callbacks import Checkpointing, KeyParameterLocalization
from lit_align.compact import AdapterSettings
from lit_align.errors import TrainingError
from lit_align.masks import ParameterMask
from lit_align.modules import SupervisedFineTuning
from tests.training_runs import (
    MemoryLogger,
    assert_equal_weights,
    instructions,
    sft_rows,
    trainer,
)


class SaveAlways(lightning.Callback):
    """A checkpoint at every hook named, of the second epoch as well."""

    def __init__(self, folder, hooks):
        self.folder = folder
        for hook in hooks:
            setattr(self, hook, lambda run, *_, hook=hook: self.save(run, hook))

    def save(self, run, hook):
        if run.sanity_checking:
            return
        place = f"{run.current_epoch}-{run.fit_loop.epoch_loop.batch_progress.current.ready}"
        run.save_checkpoint(self.folder / f"{hook}-{place}.ckpt")


HOOKS = (
    "on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad", "on_train_batch_end",
    "on_validation_batch_end", "on_validation_end", "on_train_epoch_end",
)  # fmt: skip


def fit(model, folder, *callbacks, ckpt_path=None, adapter=None, **settings):
    """Seven batches an epoch, in windows of three; validation amid a window."""
    torch.manual_seed(0)
    log = MemoryLogger()
    module = SupervisedFineTuning(str(model), learning_rate=1e-2, adapter=adapter)
    run = trainer(
        folder, callbacks=list(callbacks), accumulate_grad_batches=3, max_epochs=2, logger=log,
        log_every_n_steps=1, val_check_interval=5, **settings,
    )  # fmt: skip
    data = instructions(14, batch_size=2, splits={"validation": sft_rows(4, seed=3)})
    run.fit(module, data, ckpt_path=ckpt_path)
    assert run.global_step == 6
    return dict(module.state_dict()), log


@pytest.fixture(scope="module")
def dropout():
    return AdapterSettings(rank=2, dropout=0.3)


@pytest.fixture(scope="module")
def whole(tiny_llama_dir, dropout, tmp_path_factory):
    """A run with dropout, its checkpoints, and its end."""
    folder = tmp_path_factory.mktemp("whole")
    state, log = fit(tiny_llama_dir, folder, SaveAlways(folder, HOOKS), adapter=dropout)
    return folder, state, log


@pytest.mark.parametrize(
    "name",
    ["on_train_batch_end-0-5", "on_validation_end-0-5", "on_train_batch_end-0-7",
     "on_train_epoch_start-1-7", "on_train_batch_end-1-7"],
)  # fmt: skip
def test_from_any_moment(name, whole, tiny_llama_dir, dropout, tmp_path):
    folder, expected, log = whole
    path = folder / f"{name}.ckpt"
    assert path.exists(), sorted(p.name for p in folder.iterdir())
    resumed, again = fit(tiny_llama_dir, tmp_path, ckpt_path=path, adapter=dropout)
    assert_equal_weights(expected, resumed)
    steps = len(again.values("loss"))
    assert steps == 0 or again.values("loss") == log.values("loss")[-steps:]
    assert steps == 0 or again.values("num_tokens") == log.values("num_tokens")[-steps:]


class TermInValidation(lightning.Callback):
    """SIGTERM at its first batch; counts how many there are."""

    def __init__(self):
        self.count = 0

    def on_validation_batch_start(self, trainer, *_):
        if not trainer.sanity_checking:
            self.count += 1
            if self.count == 1:
                os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.long
def test_sigterm_does_not_wait_for_the_end_of_validation(whole, tiny_llama_dir, dropout, tmp_path):
    _, expected, _ = whole
    term, saving = TermInValidation(), Checkpointing(minutes=60)
    settings = {"adapter": dropout, "enable_checkpointing": True}
    with pytest.raises(SystemExit):
        fit(tiny_llama_dir, tmp_path, term, saving, **settings)
    assert term.count == 1
    saving = Checkpointing(minutes=60)
    resumed, _ = fit(tiny_llama_dir, tmp_path, saving, ckpt_path="last", **settings)
    assert_equal_weights(expected, resumed)


@pytest.mark.long
def test_from_every_moment(whole, tiny_llama_dir, dropout, tmp_path):
    folder, expected, _ = whole
    paths = sorted(folder.glob("*.ckpt"))
    assert len(paths) > 30
    for path in paths:
        resumed, _ = fit(tiny_llama_dir, tmp_path, ckpt_path=path, adapter=dropout)
        assert_equal_weights(expected, resumed)


@pytest.mark.long
def test_lightnings_own_callback_does_not_spoil_a_resumed_run(tiny_llama_dir, tmp_path):
    """Having forgotten what it saved, it saves again inside the first window."""
    saving = {"every_n_train_steps": 1, "save_top_k": -1}
    first = ModelCheckpoint(tmp_path / "first", "{step}", **saving)
    expected, _ = fit(tiny_llama_dir, tmp_path, first, enable_checkpointing=True)
    again = ModelCheckpoint(tmp_path / "again", "{step}", **saving)
    path = tmp_path / "first" / "step=1.ckpt"
    fit(tiny_llama_dir, tmp_path, again, ckpt_path=path, enable_checkpointing=True)
    path = tmp_path / "again" / "step=1.ckpt"
    assert path.exists()
    assert_equal_weights(expected, fit(tiny_llama_dir, tmp_path, ckpt_path=path)[0])


@pytest.mark.long
def test_amid_an_epoch_that_accumulates_otherwise(tiny_llama_dir, tmp_path):
    def run(name, path=None):
        callbacks = [
            GradientAccumulationScheduler({0: 1, 1: 2}),
            ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=1, save_top_k=-1),
        ]
        run = trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True, max_epochs=2)
        module = SupervisedFineTuning(str(tiny_llama_dir), lr_scheduler="constant")
        run.fit(module, instructions(12, batch_size=2), ckpt_path=path)
        return dict(module.state_dict())

    expected = run("whole")
    assert_equal_weights(expected, run("again", tmp_path / "whole" / "step=7.ckpt"))


@pytest.mark.parametrize("limit", [{"max_epochs": 1}, {"max_steps": 4}])
def test_a_run_killed_behind_its_last_step_has_its_end(limit, tiny_llama_dir, tmp_path):
    """The mask of its weight change is written then."""
    mask, digests = tmp_path / "mask.safetensors", []
    for _ in range(2):
        saving = Checkpointing(every_n_train_steps=1)
        callbacks = [KeyParameterLocalization("weight_change"), saving]
        run = trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True, **limit)
        module = SupervisedFineTuning(str(tiny_llama_dir), learning_rate=1e-2)
        run.fit(module, instructions(10, batch_size=2), ckpt_path="last")
        digests.append(ParameterMask.load(mask).digest)
        mask.unlink()  # as if the kill had come before it was written
    assert digests[0] == digests[1]


def test_settings_that_torch_would_not_read_again(tiny_llama_dir, tmp_path):
    """A Path and a number of numpy's, from Python; and the module is fitted once more."""
    settings = {"learning_rate": np.float64(1e-2), "lr_scheduler": "constant"}
    module = SupervisedFineTuning(tiny_llama_dir, **settings)
    logged = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        log, saving = MemoryLogger(), Checkpointing(every_n_train_steps=1)
        shared = {"callbacks": [saving], "enable_checkpointing": True, "log_every_n_steps": 1}
        for steps in (1, 2):
            run = trainer(folder, max_steps=steps, logger=log, **shared)
            run.fit(module, instructions(4, batch_size=2), ckpt_path="last")
        logged.append(log.values("num_tokens"))
    assert len(logged[0]) == 2 and logged[0] == logged[1]


def test_a_callback_that_takes_the_place_of_what_trains_is_refused(tiny_llama_dir, tmp_path):
    """It knows the model as other modules hold it; nothing could go on from its checkpoints."""
    callbacks = [EMAWeightAveraging(), Checkpointing(every_n_train_steps=1)]
    run = trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True)
    with pytest.raises(TrainingError, match=r"WeightAveraging\?\) has put something else"):
        run.fit(SupervisedFineTuning(str(tiny_llama_dir)), instructions(4, batch_size=2))


def tensors(value):
    """All of them in a checkpoint."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors(each)


def test_a_checkpoint_holds_what_trains_and_what_resuming_needs(tiny_llama_dir, tmp_path):
    """By its keys and its bytes, as plain torch reads it."""
    callbacks = [KeyParameterLocalization("random"), Checkpointing(every_n_train_steps=1)]
    run = trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True)
    module = SupervisedFineTuning(str(tiny_llama_dir), learning_rate=1e-2)
    run.fit(module, instructions(4, batch_size=2))
    path = tmp_path / "checkpoints" / "step=2.ckpt"
    content = torch.load(path, weights_only=True)
    assert content.keys() == {
        "epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops", "callbacks",
        "optimizer_states", "lr_schedulers", "hparams_name", "hyper_parameters", "SFTDataModule",
        "lit_align",
    }  # fmt: skip
    assert content["lit_align"].keys() == {
        "base_fingerprint", "mask_digest", "delta_checksum", "adapter", "seen_tokens", "run_seed",
    }  # fmt: skip
    selected = module.mask.count()
    assert sum(t.numel() for t in tensors(content["state_dict"])) == selected
    state = content["optimizer_states"][0]["state"].values()
    assert all(each.keys() == {"step", "exp_avg", "exp_avg_sq"} for each in state)
    moments = sum(each[name].numel() for each in state for name in ("exp_avg", "exp_avg_sq"))
    assert moments == 2 * selected
    assert sum(t.numel() for t in tensors(content)) < 3 * selected + 100
    overhead = path.stat().st_size - 4 * 3 * selected
    assert overhead < 600 * len(list(tensors(content)))  # zip's records, of 64 bytes aligned


def test_optimisers_of_ones_own_and_checkpoints_in_the_runs_own_folder(tiny_llama_dir, tmp_path):
    class Own(SupervisedFineTuning):
        def configure_optimizers(self):
            return torch.optim.Adafactor(self.parameters(), lr=1e-2)  # its eps is (None, 0.001)

    def run(folder, max_epochs, ckpt_path=None):
        module, keep = Own(str(tiny_llama_dir)), Checkpointing(folder)
        run = trainer(folder, callbacks=[keep], enable_checkpointing=True, max_epochs=max_epochs)
        torch.manual_seed(0)
        run.fit(module, instructions(4, batch_size=2), ckpt_path=ckpt_path)
        return dict(module.state_dict()), keep.best_model_path

    whole, _ = run(tmp_path / "whole", 2)
    _, half = run(tmp_path / "half", 1)
    resumed, _ = run(tmp_path / "half", 2, half)
    assert_equal_weights(whole, resumed)
