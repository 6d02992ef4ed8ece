"""What is logged: TRL's names, right over windows and splits."""

import csv
import math

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lit_align.callbacks import KeyParameterLocalization
from lit_align.modules import MaskedDPO, SupervisedFineTuning, TokenWeightedNPO
from lit_align.modules.metric_log import MetricLog
from tests.training_runs import (
    MemoryLogger,
    instructions,
    preference_rows,
    preferences,
    random_mask,
    sft_rows,
    trainer,
    unlearning,
    unlearning_rows,
)

EVERY_RUN = {
    "loss", "grad_norm", "learning_rate", "num_tokens", "train/tokens_per_second",
    "peak_memory_mib", "mask/density", "entropy", "mean_token_accuracy",
}  # fmt: skip
PAIRS = {
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected", "logits/chosen", "logits/rejected",
}  # fmt: skip
FORGETTING = {
    "forget_loss", "retain_loss", "logps/rejected", "logps/chosen", "rewards/rejected",
    "logits/rejected", "logits/chosen",
}  # fmt: skip
CASES = {
    "sft": (SupervisedFineTuning, {}, instructions, sft_rows, set()),
    "dpo": (MaskedDPO, {}, preferences, preference_rows, PAIRS),
    "filter": (
        MaskedDPO,
        {"filter_drop_fraction": 0.3},
        preferences,
        preference_rows,
        PAIRS | {"filter/kept_fraction"},
    ),
    "npo": (TokenWeightedNPO, {"retain": "nll"}, unlearning, unlearning_rows, FORGETTING),
}
TRAINING_ONLY = {
    "grad_norm", "learning_rate", "num_tokens", "train/tokens_per_second", "peak_memory_mib",
    "mask/density",
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_names_in_the_csv(case, tiny_llama_dir, tmp_path):
    kind, settings, data, rows, names = CASES[case]
    random_mask().save(tmp_path / "mask")
    run = trainer(
        tmp_path, logger=CSVLogger(tmp_path, "csv", ""), log_every_n_steps=2, max_epochs=2,
        callbacks=[KeyParameterLocalization(mask=str(tmp_path / "mask"))],
    )  # fmt: skip
    splits = {"validation": rows(5, seed=3), "test": rows(4, seed=4)}
    module = kind(str(tiny_llama_dir), learning_rate=1e-2, **settings)
    rows_of = data(8, batch_size=2, splits=splits)
    run.fit(module, rows_of)
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    expected = EVERY_RUN | names
    evaluated = {f"eval_{n}" for n in expected - TRAINING_ONLY}
    assert set(lines[0]) - {"epoch", "step"} == expected | evaluated
    for name in expected:
        values = [(int(row["step"]), float(row[name])) for row in lines if row[name]]
        steps = [step for step, _ in values]
        # A batch of forgetting may hold no retained response.
        assert steps == [2, 4, 6, 8] or (case == "npo" and steps and set(steps) < {2, 4, 6, 8}), (
            name
        )
        assert all(math.isfinite(v) for _, v in values), name
    for name in evaluated:
        assert sum(bool(row[name]) for row in lines) == 2, name
    densities = [float(row["mask/density"]) for row in lines if row["mask/density"]]
    assert densities == pytest.approx([0.1] * 4, abs=1e-4)
    (tested,) = run.test(module, rows_of, verbose=False)
    assert set(tested) == {f"test_{n}" for n in expected - TRAINING_ONLY}


@pytest.mark.parametrize("case", CASES)
def test_evaluation_does_not_depend_on_the_batch_size(case, tiny_llama_dir, tmp_path):
    kind, settings, data, rows, _ = CASES[case]
    results = []
    for size in (1, 2, 5):
        module = kind(str(tiny_llama_dir), **settings)
        rows_of = data(4, eval_batch_size=size, splits={"validation": rows(5, seed=3)})
        results.append(trainer(tmp_path).validate(module, rows_of, verbose=False)[0])
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-4, abs=1e-6)


def test_tokens_are_counted_once(tiny_llama_dir, tmp_path):
    log = MemoryLogger()
    data = instructions(10, batch_size=3)
    trainer(tmp_path, logger=log, log_every_n_steps=3, max_epochs=2).fit(
        SupervisedFineTuning(str(tiny_llama_dir)), data
    )
    total = sum(row.num_tokens for row in data.train_rows)
    assert log.values("num_tokens")[-1] == 2 * total
    assert [s for s, m in log.rows if "loss" in m] == [3, 6, 8]  # the rest at the end


def test_the_learning_rate_follows_its_schedule(tiny_llama_dir, tmp_path):
    log = MemoryLogger()
    module = SupervisedFineTuning(
        str(tiny_llama_dir), learning_rate=1.0e-3, warmup_ratio=0.5, lr_scheduler="linear"
    )
    trainer(tmp_path, logger=log, log_every_n_steps=1).fit(module, instructions(8, batch_size=2))
    # After steps 1 to 4 of 4, two of them warm-up.
    assert log.values("learning_rate") == pytest.approx([5e-4, 1e-3, 5e-4, 0.0])


# ---- MetricLog -----------------------------------------------------------------------------------


def test_means_are_weighted():
    log, one = MetricLog(("a", "b")), torch.tensor(1.0)
    log.update({"a": (torch.tensor(2.0), torch.tensor(3))})
    log.update({"a": (one, torch.tensor(1)), "b": (torch.tensor(5.0), one)})
    assert log.compute_and_reset() == {"a": 1.75, "b": 5.0}
    log.update({"b": (one, one)})
    assert log.compute_and_reset() == {"b": 1.0}


def test_a_value_of_weight_zero_is_left_out():
    log = MetricLog(("a",))
    log.update({"a": (torch.tensor(torch.nan), torch.tensor(0.0))})
    log.update({"a": (torch.tensor(4.0), torch.tensor(2.0))})
    assert log.compute_and_reset() == {"a": 4.0}


def test_a_log_survives_inference_mode():
    log = MetricLog(("a",))
    with torch.inference_mode():
        log.update({"a": (torch.tensor(1.0), torch.tensor(1.0))})
        log.compute_and_reset()
    log.update({"a": (torch.tensor(2.0), torch.tensor(1.0))})
    assert log.compute_and_reset() == {"a": 2.0}
