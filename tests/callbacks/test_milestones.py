"""What is kept at shares of a fit's steps."""

import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align.callbacks import KeepMilestones, StopWhenStable
from lit_align.compact import AdapterSettings, Delta, load_adapters, trainable
from lit_align.errors import TrainingError
from lit_align.language_model import load_language_model
from lit_align.modules import SupervisedFineTuning
from tests.training_runs import instructions, trainer

LORA = AdapterSettings(rank=2, dropout=0.0)


def fit(folder, tmp_path, *callbacks, adapter=LORA, ckpt_path=None, **settings):
    """Twenty steps in two epochs."""
    module = SupervisedFineTuning(str(folder), learning_rate=1e-2, adapter=adapter)
    run = trainer(tmp_path, callbacks=list(callbacks), **{"max_epochs": 2} | settings)
    run.fit(module, instructions(10, batch_size=1), ckpt_path=ckpt_path)
    return module


def test_milestones_stand_at_their_share_of_the_steps(tiny_llama_dir, tmp_path):
    steps = []
    keep = KeepMilestones(
        (0.01, 0.25, 0.5, 0.51, 1.0),
        save=lambda model, folder: (folder.mkdir(), steps.append(folder.name)),
    )
    fit(tiny_llama_dir, tmp_path, keep)
    # 0.2 of a step is one; 10.2 steps are eleven.
    assert list(keep.steps.values()) == [1, 5, 10, 11, 20]
    assert steps == ["1", "25", "50", "51", "100"]
    record = json.loads((tmp_path / "milestones" / "milestones.json").read_text())
    assert record["steps"] == 20
    assert record["milestones"]["25"] == {"fraction": 0.25, "step": 5}


def test_several_milestones_may_fall_on_one_step(tiny_llama_dir, tmp_path):
    steps = []
    keep = KeepMilestones((0.01, 0.125, 1.0), save=lambda _, folder: steps.append(folder.name))
    fit(tiny_llama_dir, tmp_path, keep, max_epochs=1, accumulate_grad_batches=4)
    assert list(keep.steps.values()) == [1, 1, 3]
    assert steps == ["1", "12_5", "100"]


def test_a_milestone_is_the_change_by_then(tiny_llama_dir, tmp_path):
    """The last one is the trained model's, the first one differs from it."""
    folder = tmp_path / "kept"
    module = fit(tiny_llama_dir, tmp_path, KeepMilestones((0.05, 1.0), str(folder)))
    base, _ = load_language_model(tiny_llama_dir)
    first, last = (load_adapters(folder / name, base) for name in ("5", "100"))
    trained = dict(trainable(module.model))
    name = "model.layers.0.mlp.up_proj"
    final = trained[f"{name}.lora_B.default.weight"]
    assert torch.equal(last[f"{name}.weight"].b, final)
    assert not torch.equal(first[f"{name}.weight"].b, final)


def test_a_full_fit_keeps_deltas(tiny_llama_dir, tmp_path):
    module = fit(tiny_llama_dir, tmp_path, KeepMilestones((0.5, 1.0)), adapter=None)
    half, whole = (
        Delta.load(tmp_path / "milestones" / n / "delta.safetensors") for n in ("50", "100")
    )
    for name, parameter in module.model.named_parameters():
        assert torch.equal(whole.values[name], parameter.detach().reshape(-1)), name
    assert any(not torch.equal(half.values[n], whole.values[n]) for n in half.values)


def test_a_fit_that_ends_early_lacks_the_later_ones(tiny_llama_dir, tmp_path):
    early = StopWhenStable(50.0, 2)
    fit(tiny_llama_dir, tmp_path, KeepMilestones((0.05, 0.25, 0.9)), early)
    record = json.loads((tmp_path / "milestones" / "milestones.json").read_text())
    assert list(record["milestones"]) == ["5", "25"] and record["steps"] == 20


def test_a_resumed_fit_keeps_what_is_still_to_come(tiny_llama_dir, tmp_path):
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=8, save_top_k=-1)
    fit(tiny_llama_dir, tmp_path, KeepMilestones(), saving, enable_checkpointing=True)
    steps = []
    keep = KeepMilestones(save=lambda model, folder: steps.append(folder.name))
    fit(tiny_llama_dir, tmp_path, keep, ckpt_path=tmp_path / "step=8.ckpt")
    assert steps == ["50", "75", "100"]
    record = json.loads((tmp_path / "milestones" / "milestones.json").read_text())
    assert list(record["milestones"]) == ["1", "25", "50", "75", "100"]


@pytest.mark.parametrize("fractions", [(), (0.0, 1.0), (0.5, 1.1)])
def test_shares_that_are_none(fractions):
    with pytest.raises(TrainingError, match="shares of the steps"):
        KeepMilestones(fractions)
