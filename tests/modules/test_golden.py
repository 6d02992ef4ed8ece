"""Twenty steps of masked DPO on the tiny model, against the numbers of the day it was right."""

import pytest

from lit_align.callbacks import KeyParameterLocalization
from lit_align.modules import MaskedDPO
from tests.training_runs import MemoryLogger, preferences, random_mask, trainer

GOLDEN_LOSSES = [
    0.693147, 0.693147, 0.692557, 0.696307, 0.689565, 0.697089, 0.704781, 0.693998, 0.681917,
    0.707987, 0.61356, 0.611738, 0.588419, 0.621177, 0.595138, 0.619279, 0.600071, 0.593887,
    0.547987, 0.55578,
]  # fmt: skip


@pytest.mark.parametrize("reference", ["cache", "swap"])
def test_twenty_steps(reference, tiny_llama_dir, tmp_path):
    random_mask().save(tmp_path / "mask")
    module = MaskedDPO(
        str(tiny_llama_dir), beta=0.5, learning_rate=5e-3, weight_decay=0.01, eps=1e-6,
        reference=reference,
    )  # fmt: skip
    log = MemoryLogger()
    callbacks = [KeyParameterLocalization(mask=str(tmp_path / "mask"))]
    trainer(
        tmp_path, logger=log, log_every_n_steps=1, callbacks=callbacks, max_epochs=2,
        gradient_clip_val=1.0,
    ).fit(module, preferences(40, group_by_length=True))  # fmt: skip
    assert log.values("loss") == pytest.approx(GOLDEN_LOSSES, rel=1e-3)
