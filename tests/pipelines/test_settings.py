"""Settings: what they are by default, and that wrong ones are named before anything runs."""

from typing import Any

import pytest

from lit_align.errors import PipelineError
from lit_align.pipelines import settings as s
from lit_align.pipelines.training import module_settings

WRONG: list[tuple[type, str, Any]] = [
    (s.DataSettings, "data.train_rows", -1),
    (s.SFTSettings, "sft.learning_rate", 0.0),
    (s.SFTSettings, "sft.learning_rate", float("nan")),
    (s.SFTSettings, "sft.epochs", 0),
    (s.SFTSettings, "sft.batch_size", 0),
    (s.SFTSettings, "sft.accumulate", 0),
    (s.SFTSettings, "sft.weight_decay", -0.1),
    (s.SFTSettings, "sft.betas", (0.9, 1.0)),
    (s.SFTSettings, "sft.eps", 0.0),
    (s.SFTSettings, "sft.warmup_ratio", 1.5),
    (s.SFTSettings, "sft.lr_scheduler", "cosinus"),
    (s.SFTSettings, "sft.gradient_clip", -1.0),
    (s.SFTSettings, "sft.max_length", 1),
    (s.SFTSettings, "sft.max_steps", -2),
    (s.SampleSettings, "sample.num_samples", 0),
    (s.SampleSettings, "sample.temperature", 0.0),
    (s.SampleSettings, "sample.top_p", 1.1),
    (s.DPOSettings, "warm_up.epochs", 0),
    (s.DPOSettings, "warm_up.beta", 0.0),
    (s.DPOSettings, "warm_up.label_smoothing", 0.5),
    (s.LocateSettings, "locate.forget_ratio", 0.0),
    (s.LocateSettings, "locate.improve_ratio", 2.0),
    (s.TokenRewardSettings, "token_rewards.threshold", 0.0),
    (s.TokenRewardSettings, "token_rewards.teacher_temperature", -1.0),
    (s.TokenRewardSettings, "token_rewards.epochs", 0),
    (s.ForgetSettings, "forget.beta", -1.0),
    (s.ForgetSettings, "forget.batch_size", 0),
    (s.ImproveSettings, "improve.drop_fraction", 1.0),
    (s.ImproveSettings, "improve.keep_fraction", 0.0),
    (s.ImproveSettings, "improve.beta", 0.0),
    (s.EvaluateSettings, "evaluate.batch_size", 0),
]


@pytest.mark.parametrize(("group", "option", "value"), WRONG)
def test_a_wrong_value_is_named(group, option, value):
    with pytest.raises(PipelineError, match=f"^{option} is "):
        group(**{option.split(".")[1]: value})


def test_one_filter_fraction_is_enough_and_two_are_too_many():
    assert s.ImproveSettings().dropped == 0.1
    assert s.ImproveSettings(drop_fraction=0.2).dropped == 0.2
    assert s.ImproveSettings(keep_fraction=0.5).dropped is None
    with pytest.raises(PipelineError, match=r"improve\.drop_fraction and improve\.keep_fraction"):
        s.ImproveSettings(drop_fraction=0.1, keep_fraction=0.5)


def test_the_optimisers_settings_reach_the_module():
    chosen = module_settings(s.SFTSettings(betas=(0.8, 0.9), eps=1e-6), s.RunSettings())
    assert chosen["betas"] == (0.8, 0.9) and chosen["eps"] == 1e-6


def test_token_rewards_are_the_papers_by_default():
    settings = s.TokenRewardSettings()
    assert (settings.kind, settings.threshold, settings.max_length) == ("binary", 0.5, 2048)
