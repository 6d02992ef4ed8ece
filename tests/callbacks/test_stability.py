"""The ε-stability test on losses by hand, and what it does to a fit."""

import json
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align.callbacks import StopWhenStable
from lit_align.errors import TrainingError
from lit_align.modules import SupervisedFineTuning
from tests.training_runs import MemoryLogger, instructions, trainer


def feed(callback, losses, rates=None):
    """Steps with these losses; the step at which the fit is told to stop, or None."""
    run = SimpleNamespace(
        global_step=0, should_stop=False, optimizers=[SimpleNamespace(param_groups=[{"lr": 1.0}])]
    )
    callback.on_train_start(run, None)
    for step, loss in enumerate(losses, 1):
        run.global_step = step
        run.optimizers[0].param_groups[0]["lr"] = rates[step - 1] if rates else 1.0
        module = SimpleNamespace(step_loss=loss)
        callback.on_train_batch_end(run, module, None, None, step)
        if run.should_stop:
            return step
    return None


def test_the_change_a_step_by_hand():
    """Means 7 and 4 of neighbouring windows of 2 steps: 3 lower in 2 steps, 1.5 a step."""
    callback = StopWhenStable(epsilon=1.0, window=2)
    feed(callback, [8.0, 6.0, 5.0, 3.0])
    assert callback.change_a_step(4) == -1.5


def test_a_constant_loss_is_stable_after_three_windows():
    """Rates count as rising in the first step; it must hold at steps 2w + 1 ... 3w of the rest."""
    for window in (1, 2, 5):
        assert feed(StopWhenStable(0.1, window), [2.0] * 40) == 3 * window


def test_a_loss_that_falls_faster_than_epsilon_is_not_stable():
    falling = [10 - 0.2 * step for step in range(40)]
    assert feed(StopWhenStable(0.19, 4), falling) is None
    assert feed(StopWhenStable(0.21, 4), falling) == 12


def test_noise_within_a_window_averages_out_and_jumps_start_anew():
    noisy = [2.0 + (-1) ** step for step in range(40)]
    assert feed(StopWhenStable(0.01, 4), noisy) == 12
    assert feed(StopWhenStable(0.01, 3), noisy) is None  # windows of odd length differ by 2/3
    jump = [2.0] * 9 + [9.0] + [2.0] * 30
    # Windows with the jump are those that end at steps 10 to 17; then w steps have to hold.
    assert feed(StopWhenStable(0.01, 4), jump) == 17 + 4


def test_steps_of_the_warm_up_do_not_count():
    rates = [step / 10 for step in range(1, 11)] + [1.0] * 30
    callback = StopWhenStable(0.1, 4)
    assert feed(callback, [2.0] * 40, rates) == 10 + 11
    assert callback.warmup_steps == 10


def test_a_loss_that_is_no_number_is_not_stable():
    assert feed(StopWhenStable(0.1, 2), [float("nan")] * 20) is None


@pytest.mark.parametrize("settings", [{"epsilon": 0.0}, {"epsilon": -1.0}, {"window": 0}])
def test_settings_that_cannot_be(settings):
    with pytest.raises(TrainingError, match="must be > 0, window"):
        StopWhenStable(**settings)


def fit(folder, tmp_path, callback, *more, ckpt_path=None, **settings):
    log = MemoryLogger()
    module = SupervisedFineTuning(
        str(folder), learning_rate=1e-3, warmup_ratio=0.0, lr_scheduler="constant"
    )
    run = trainer(
        tmp_path, logger=log, log_every_n_steps=1, callbacks=[callback, *more], **settings
    )
    run.fit(module, instructions(8, batch_size=1), ckpt_path=ckpt_path)
    return run, log


def test_a_fit_stops_where_it_is_stable_and_says_so(tiny_llama_dir, tmp_path):
    callback = StopWhenStable(5.0, 2)  # any change is small enough
    run, _ = fit(tiny_llama_dir, tmp_path, callback, max_epochs=2)
    assert run.global_step == callback.stable_at == 6
    record = json.loads((tmp_path / "stability.json").read_text())
    assert record["stable"] and record["steps"] == len(record["losses"]) == 6
    assert (record["epsilon"], record["window"]) == (5.0, 2)


def test_its_losses_are_those_of_whole_accumulation_windows(tiny_llama_dir, tmp_path):
    """Eight rows in windows of three, the last of two: the logged loss is exact, too."""
    callback = StopWhenStable(1e-9, 2)
    run, log = fit(tiny_llama_dir, tmp_path, callback, max_epochs=2, accumulate_grad_batches=3)
    assert run.global_step == len(callback.losses) == 6
    assert callback.losses == pytest.approx(log.values("loss"), rel=1e-6)


def test_an_epsilon_that_is_never_met_ends_at_the_step_limit_and_is_told(tiny_llama_dir, tmp_path):
    output = tmp_path / "a" / "record.json"
    callback = StopWhenStable(1e-9, 2, output=str(output))
    with pytest.warns(UserWarning, match="never became stable.*its limit of 7 steps"):
        run, _ = fit(tiny_llama_dir, tmp_path, callback, max_steps=7)
    assert run.global_step == 7 and callback.stable_at is None
    record = json.loads(output.read_text())
    assert not record["stable"] and record["change_a_step"] == callback.change_a_step(7)


def test_too_few_steps_for_any_window(tiny_llama_dir, tmp_path):
    with pytest.warns(UserWarning, match="limit of 3 steps.*changing by nan"):
        fit(tiny_llama_dir, tmp_path, StopWhenStable(1.0, 2), max_steps=3)
    assert json.loads((tmp_path / "stability.json").read_text())["change_a_step"] is None


def test_a_resumed_fit_goes_on_with_its_losses(tiny_llama_dir, tmp_path):
    whole = StopWhenStable(5.0, 3)
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(tiny_llama_dir, tmp_path, whole, saving, max_epochs=2, enable_checkpointing=True)
    resumed = StopWhenStable(5.0, 3)
    run, _ = fit(
        tiny_llama_dir, tmp_path, resumed, max_epochs=2, ckpt_path=tmp_path / "step=5.ckpt"
    )
    assert run.global_step == whole.stable_at == resumed.stable_at == 9
    assert resumed.losses == whole.losses


def test_a_fit_that_was_stable_does_not_go_on(tiny_llama_dir, tmp_path):
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = StopWhenStable(5.0, 2)
    fit(tiny_llama_dir, tmp_path, whole, saving, max_epochs=2, enable_checkpointing=True)
    again = StopWhenStable(5.0, 2)
    run, _ = fit(tiny_llama_dir, tmp_path, again, max_epochs=2, ckpt_path=tmp_path / "step=6.ckpt")
    assert run.global_step == again.stable_at == 6 and again.losses == whole.losses
    assert json.loads((tmp_path / "stability.json").read_text())["steps"] == 6
