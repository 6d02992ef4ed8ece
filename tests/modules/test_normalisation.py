"""The loss is normalised over the whole accumulation window, an incomplete last one included."""

import pytest

from lit_align.callbacks import KeyParameterLocalization
from lit_align.modules import MaskedDPO, SupervisedFineTuning, TokenWeightedNPO
from tests.training_runs import (
    MemoryLogger,
    assert_close_weights,
    instructions,
    preferences,
    stored,
    trainer,
    unlearning,
    weights,
)

# eps: with Adam's own, rounding in a gradient near zero would become a whole step.
STEP = {"learning_rate": 1e-2, "eps": 1e-3, "warmup_ratio": 0.0}
CASES = {
    "sft": (SupervisedFineTuning, {}, instructions),
    "dpo": (MaskedDPO, {}, preferences),
    "ipo": (MaskedDPO, {"loss_type": "ipo"}, preferences),
    "npo": (TokenWeightedNPO, {}, unlearning),
    "npo-nll": (TokenWeightedNPO, {"retain": "nll", "retain_weight": 0.5}, unlearning),
    "npo-kl": (TokenWeightedNPO, {"retain": "kl", "reference": "swap"}, unlearning),
    "npo-sequence": (TokenWeightedNPO, {"loss_type": "sequence", "retain": "nll"}, unlearning),
}


@pytest.mark.parametrize("case", CASES)
def test_windows_of_equal_rows_give_equal_weights(case, tiny_llama_dir, tmp_path):
    kind, settings, data = CASES[case]
    runs = []
    for batch_size, accumulate in ((4, 1), (2, 2), (1, 4)):
        module = kind(str(tiny_llama_dir), **STEP, **settings)
        log = MemoryLogger()
        run = trainer(
            tmp_path,
            accumulate_grad_batches=accumulate,
            logger=log,
            log_every_n_steps=1,
            callbacks=[KeyParameterLocalization("random", 0.3)],
        )
        run.fit(module, data(10, batch_size=batch_size))  # the last window holds two rows
        assert run.global_step == 3
        runs.append((weights(module), log.values("loss"), log.values("grad_norm")))
    for values, losses, norms in runs[1:]:
        assert_close_weights(runs[0][0], values, atol=2e-6)
        assert losses == pytest.approx(runs[0][1], rel=1e-4)
        assert norms == pytest.approx(runs[0][2], rel=1e-4)
    moved = max(float((runs[0][0][n] - t).abs().max()) for n, t in stored(tiny_llama_dir).items())
    assert moved > 1e-3  # so the tolerance above means something
