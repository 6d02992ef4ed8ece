"""Which checkpoints stay, how `last` is found, and how a run ends when it is told or has to."""

import os
import resource
import shutil
import signal
import socket

import lightning
import pytest

from lit_align.callbacks import Checkpointing, KeyParameterLocalization, LockedFolder
from lit_align.checkpoint_file import load_sound
from lit_align.data import SFTDataModule
from lit_align.errors import LitAlignError, TrainingError
from lit_align.modules import SupervisedFineTuning
from tests.tiny_models import tiny_tokenizer
from tests.training_runs import assert_equal_weights, instructions, trainer

SETTINGS = {"learning_rate": 1e-2, "weight_decay": 0.1, "lr_scheduler": "constant"}


class At(lightning.Callback):
    """Does something at the end of one batch, counted from 0."""

    def __init__(self, batch, act):
        self.batch, self.act = batch, act

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.batch:
            self.act()


def fit(model, folder, *callbacks, ckpt_path=None, **settings):
    """Ten batches; returns what trained."""
    saving = settings.pop("saving", None) or Checkpointing(every_n_train_steps=1)
    callbacks = [KeyParameterLocalization("random"), saving, *callbacks]
    module = SupervisedFineTuning(str(model), **SETTINGS)
    run = trainer(folder, callbacks=callbacks, enable_checkpointing=True, **settings)
    run.fit(module, instructions(20, batch_size=2), ckpt_path=ckpt_path)
    return dict(module.state_dict())


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def whole(tiny_llama_dir, tmp_path_factory):
    return fit(tiny_llama_dir, tmp_path_factory.mktemp("whole"))


def test_the_newest_stay_and_the_newest_sound_one_is_last(tiny_llama_dir, tmp_path):
    """In a run that has been resumed."""
    fit(tiny_llama_dir, tmp_path, max_steps=3)
    fit(tiny_llama_dir, tmp_path, ckpt_path="last")
    assert names(tmp_path / "checkpoints") == ["step=10.ckpt", "step=9.ckpt"]
    newest = tmp_path / "checkpoints" / "step=10.ckpt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    with pytest.warns(UserWarning, match=r"step=10\.ckpt is damaged \(the checksum of .* is wrong"):
        found = Checkpointing()._find_last_checkpoints(trainer(tmp_path))
    sound = tmp_path / "checkpoints" / "step=9.ckpt"
    assert found == {str(sound)}
    sound.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(TrainingError, match="checkpoints: every checkpoint is damaged"),
    ):
        Checkpointing()._find_last_checkpoints(trainer(tmp_path))


@pytest.mark.long
def test_last_goes_on_from_a_sound_one(whole, tiny_llama_dir, tmp_path):
    fit(tiny_llama_dir, tmp_path, max_steps=6)
    newest = tmp_path / "checkpoints" / "step=6.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match="damaged"):
        assert_equal_weights(whole, fit(tiny_llama_dir, tmp_path, ckpt_path="last"))


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.long), 4])
def test_sigterm_saves_and_ends(accumulate, tiny_llama_dir, tmp_path):
    """At the sixth batch: after a step, or amid a window."""
    rare = {"saving": Checkpointing(minutes=60), "accumulate_grad_batches": accumulate}
    expected = fit(tiny_llama_dir, tmp_path / "whole", **rare)
    rare["saving"] = Checkpointing(minutes=60)
    with pytest.raises(SystemExit) as ended:
        fit(tiny_llama_dir, tmp_path, At(5, terminate), **rare)
    assert ended.value.code == 143
    step = 6 if accumulate == 1 else 1
    assert names(tmp_path / "checkpoints") == [f"step={step}.ckpt"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    rare["saving"] = Checkpointing(minutes=60)
    assert_equal_weights(expected, fit(tiny_llama_dir, tmp_path, ckpt_path="last", **rare))


@pytest.fixture
def slurm(monkeypatch):
    """A job of one task; returns what was asked of `scontrol`."""
    for name in ("JOB_ID", "NTASKS", "PROCID", "LOCALID", "NODEID", "JOB_NAME"):
        monkeypatch.setenv(f"SLURM_{name}", {"JOB_ID": "7", "NTASKS": "1"}.get(name, "0"))
    asked = []
    connector = "lightning.pytorch.trainer.connectors.signal_connector"
    monkeypatch.setattr(f"{connector}.call", lambda command: asked.append(command) or 0)
    return asked


def test_preempted_by_slurm_goes_on_by_itself(whole, slurm, tiny_llama_dir, tmp_path):
    """Of what earlier turns left, the newest two stay."""
    with pytest.raises(SystemExit):
        fit(tiny_llama_dir, tmp_path, At(3, terminate), saving=Checkpointing(minutes=60))
    assert "hpc_ckpt_1.ckpt" in names(tmp_path)
    for number in (2, 3):
        shutil.copy(tmp_path / "hpc_ckpt_1.ckpt", tmp_path / f"hpc_ckpt_{number}.ckpt")
    with pytest.raises(SystemExit):
        fit(tiny_llama_dir, tmp_path, At(5, terminate), saving=Checkpointing(minutes=60))
    found = {path.name for path in tmp_path.glob("hpc*")}
    assert found == {"hpc_ckpt_3.ckpt", "hpc_ckpt_4.ckpt"}
    resumed = fit(tiny_llama_dir, tmp_path, saving=Checkpointing(minutes=60))
    assert_equal_weights(whole, resumed)


@pytest.mark.long
def test_slurms_signal_is_answered_after_a_batch(whole, slurm, tiny_llama_dir, tmp_path):
    class MidStep(SupervisedFineTuning):
        """It comes while a step is under way."""

        def on_before_optimizer_step(self, optimizer):
            if self.global_step == 4:
                os.kill(os.getpid(), signal.SIGUSR1)
                assert not list(tmp_path.glob("hpc*"))
            super().on_before_optimizer_step(optimizer)

    module = MidStep(str(tiny_llama_dir), **SETTINGS)
    callbacks = [KeyParameterLocalization("random"), Checkpointing(minutes=60)]
    run = trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True, max_steps=7)
    run.fit(module, instructions(20, batch_size=2))
    assert slurm == [["scontrol", "requeue", "7"]]
    resumed = fit(tiny_llama_dir, tmp_path, saving=Checkpointing(minutes=60))  # from the fifth step
    assert_equal_weights(whole, resumed)


@pytest.mark.parametrize("kind", [Checkpointing, LockedFolder])
def test_a_second_run_in_the_folder_is_refused(kind, tiny_llama_dir, tmp_path):
    refused = []

    def second():
        with pytest.raises(TrainingError) as error:
            fit(tiny_llama_dir, tmp_path, saving=kind())
        refused.append(str(error.value))

    fit(tiny_llama_dir, tmp_path, At(1, second), saving=kind())
    who = f"process {os.getpid()} on {socket.gethostname()}"
    assert refused == [
        f"another run ({who}) works in {tmp_path}: wait for it, or choose another output folder"
    ]
    fit(tiny_llama_dir, tmp_path, saving=kind())  # and the folder is let go of


def test_a_full_disk_leaves_the_checkpoint_before(whole, tiny_llama_dir, tmp_path):
    """As large a file as the limit allows is all that can be written from the sixth batch on."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    try:
        with pytest.raises(TrainingError, match=r"step=6\.ckpt: .* not be written \(File too lar"):
            fit(tiny_llama_dir, tmp_path, At(5, fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path / "checkpoints") == ["step=4.ckpt", "step=5.ckpt"]
    assert_equal_weights(whole, fit(tiny_llama_dir, tmp_path, ckpt_path="last"))


def test_a_folder_that_cannot_be_written_is_named_at_the_start(tiny_llama_dir, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="file/checkpoints: checkpoints cannot be written"):
        fit(tiny_llama_dir, tmp_path / "file")


@pytest.mark.long
def test_a_vanished_data_file_is_named_and_the_checkpoint_stays(tiny_llama_dir, tmp_path):
    """A stream is opened again for every epoch."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(8 * '{"prompt": "How many?", "completion": " It is 3."}\n')
    data = SFTDataModule(tiny_tokenizer(), str(rows), batch_size=2, streaming=True)
    callbacks = [At(2, rows.unlink), Checkpointing(every_n_train_steps=1)]
    settings = {"enable_checkpointing": True, "max_steps": 8, "max_epochs": 2}
    run = trainer(tmp_path, callbacks=callbacks, **settings)
    with pytest.raises(LitAlignError, match=r"rows\.jsonl"):
        run.fit(SupervisedFineTuning(str(tiny_llama_dir), **SETTINGS), data)
    assert load_sound(tmp_path / "checkpoints" / "step=4.ckpt")["global_step"] == 4


@pytest.mark.parametrize("wrong", [{"minutes": 0}, {"keep": 0}, {"every_n_train_steps": -1}])
def test_settings_out_of_range(wrong):
    with pytest.raises(TrainingError, match="must be positive"):
        Checkpointing(**wrong)
