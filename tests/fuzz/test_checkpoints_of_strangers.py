"""What a crafted checkpoint asks Lightning for: settings, and other checkpoints to remove."""

import json
import shutil

import pytest
import torch

from lit_align.callbacks import Checkpointing
from lit_align.cli import main
from lit_align.errors import TrainingError
from lit_align.modules import SupervisedFineTuning
from tests.training_runs import instructions, trainer

FIT = ["--config", "configs/sft_tiny.yaml", "--trainer.enable_progress_bar", "false"]


@pytest.fixture
def checkpoint(tiny_llama_dir, tmp_path):
    """The path of one, of a run in `tmp_path`."""
    fit(tiny_llama_dir, tmp_path)
    return tmp_path / "checkpoints" / "step=2.ckpt"


def fit(model, folder, ckpt_path=None, **settings):
    saving = Checkpointing(every_n_train_steps=1, keep=1)
    run = trainer(folder, callbacks=[saving], enable_checkpointing=True, **settings)
    module = SupervisedFineTuning(str(model), learning_rate=1e-2)
    run.fit(module, instructions(4, batch_size=2), ckpt_path=ckpt_path)


def crafted(path, change):
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def test_its_settings_do_not_choose_whose_code_runs(checkpoint, tiny_llama_dir, tmp_path):
    """Its model brings code, and it says that this is trusted."""
    evil = shutil.copytree(tiny_llama_dir, tmp_path / "evil")
    config = json.loads((evil / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "code.Evil"}}
    (evil / "config.json").write_text(json.dumps(config))
    (evil / "code.py").write_text(f"open({str(tmp_path / 'it ran')!r}, 'w')\nclass Evil: pass\n")
    asked = {"trust_remote_code": True, "model": str(evil)}
    crafted(checkpoint, lambda content: content["hyper_parameters"].update(asked))
    words = [*FIT, f"--trainer.default_root_dir={tmp_path / 'runs'}"]
    words += [f"--model.init_args.model={tiny_llama_dir}", f"--ckpt_path={checkpoint}"]
    main(["validate", *words, "--data.init_args.validation_fraction=0.2"])
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("outside", ["{folder}/../victim", 7])
def test_nothing_outside_is_removed(outside, checkpoint, tiny_llama_dir, tmp_path):
    """Lightning keeps so many checkpoints and removes others, by the list of the one it reads."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    if isinstance(outside, str):
        outside = outside.format(folder=checkpoint.parent)

    def change(content):
        (state,) = content["callbacks"].values()
        state["best_k_models"] = {outside: torch.tensor(0)}
        state["kth_best_model_path"] = outside

    crafted(checkpoint, change)
    with pytest.raises(TrainingError, match="as another, and cannot"):
        fit(tiny_llama_dir, tmp_path, ckpt_path=checkpoint, max_epochs=2)
    assert victim.read_text() == "precious"
