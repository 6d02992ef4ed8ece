"""What a crafted checkpoint asks Lightning for: settings, and other checkpoints to remove."""

import json
import random
import shutil

import pytest
import torch

from lit_align.callbacks import Checkpointing
from lit_align.cli import main
from lit_align.errors import LitAlignError, TrainingError
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

    crafted(checkpoint, change)
    with pytest.raises(TrainingError, match="best_k_models is"):
        fit(tiny_llama_dir, tmp_path, ckpt_path=checkpoint, max_epochs=2)
    assert victim.read_text() == "precious"


# ---- anything anywhere -----------------------------------------------------------------------

ANYTHING = (None, "x", -1, 2**62, [], {}, torch.zeros(3), float("nan"), 1.5, True)


def places(value, at=()):
    """Where values stand in it, as the keys that lead there."""
    yield at
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*at, key))


def changed_somewhere(content, draw):
    """Leave out a value, or put another in its place."""
    part = draw.choice([name for name in content if name != "hyper_parameters"])
    *way, last = draw.choice([at for at in places(content) if at and at[0] == part])
    for key in way:
        content = content[key]
    if draw.random() < 0.3:
        del content[last]
    else:
        content[last] = draw.choice(ANYTHING)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seeds", [range(10), pytest.param(range(10, 250), marks=pytest.mark.long)])
def test_only_our_errors_come_of_resuming(seeds, checkpoint, tiny_llama_dir, tmp_path):
    good, refused = checkpoint.read_bytes(), 0
    for seed in seeds:
        checkpoint.write_bytes(good)
        crafted(checkpoint, lambda content, s=seed: changed_somewhere(content, random.Random(s)))
        try:
            fit(tiny_llama_dir, tmp_path / "out", ckpt_path=checkpoint, max_epochs=2)
        except LitAlignError:
            refused += 1
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert refused > len(seeds) / 3
