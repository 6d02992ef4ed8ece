"""The learning rate over a run."""

import pytest

from lit_align.data import SFTDataModule
from lit_align.errors import TrainingError
from lit_align.modules import SupervisedFineTuning
from lit_align.pipelines.settings import RunSettings, TrainSettings
from lit_align.pipelines.training import make_trainer, module_settings
from tests.training_runs import sft_rows


def learning_rate_at_the_end(folder, tmp_path, **settings) -> float:
    train = TrainSettings(learning_rate=1e-2, batch_size=2, **settings)
    module = SupervisedFineTuning(str(folder), **module_settings(train, RunSettings()))
    data = SFTDataModule.from_rows(str(folder), {"train": sft_rows(8)}, batch_size=2)
    trainer = make_trainer(train, RunSettings(accelerator="cpu"), tmp_path)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 4
    return trainer.optimizers[0].param_groups[0]["lr"]


def test_cosine_ends_at_zero_or_at_its_share_of_the_peak(tiny_llama_dir, tmp_path):
    assert learning_rate_at_the_end(tiny_llama_dir, tmp_path) == pytest.approx(0.0, abs=1e-12)
    at_end = learning_rate_at_the_end(tiny_llama_dir, tmp_path, min_lr_ratio=0.1)
    assert at_end == pytest.approx(1e-3)


@pytest.mark.parametrize(("schedule", "ratio"), [("linear", 0.1), ("cosine", 1.5)])
def test_the_share_is_cosines_alone(schedule, ratio):
    with pytest.raises(TrainingError, match="of cosine alone"):
        SupervisedFineTuning("m", lr_scheduler=schedule, min_lr_ratio=ratio)
