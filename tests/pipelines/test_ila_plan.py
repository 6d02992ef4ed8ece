"""What each stage of an ILA run is done again for, without running any."""

import dataclasses
from typing import Any

import pytest

from lit_align.pipelines.ila import stages
from lit_align.pipelines.ila.pipeline import stages_of
from lit_align.pipelines.ila.run import ILARun
from lit_align.pipelines.ila.variants import trained
from tests.pipelines.ila_settings import TINY


@pytest.fixture
def plan(tiny_llama_dir, tmp_path):
    """Settings of groups → the stages by name, and the run."""

    def make(**changes: dict[str, Any]):
        groups = {n: dataclasses.replace(v, **changes.get(n, {})) for n, v in TINY.items()}
        machine = groups.pop("run")
        run = ILARun(tmp_path, str(tiny_llama_dir), machine=machine, **groups)
        return {stage.name: stage for stage in stages_of(run)}, run

    return make


def test_scores_are_learned_again_for_another_change_and_for_no_other_milestone(plan):
    milestones = {"until": "milestones", "milestones": (0.5, 1.0)}
    one, _ = plan(stage1=milestones)
    two, _ = plan(stage1=milestones, stage2={"milestones": (0.5, 1.0)})
    assert "scores_sft_50" in two and "scores_sft_50" not in one
    assert one["scores_sft_100"].config == two["scores_sft_100"].config
    for name in ("scores_sft_50", "scores_sft_100"):
        assert "change_sft" in two[name].inputs
    given, _ = plan(stage1={"change": ("elsewhere",)})
    assert "elsewhere" in map(str, given["scores_sft_last"].inputs)


def test_a_variant_is_trained_again_for_its_own_mask_alone(plan):
    found, run = plan(use={"top": (0.1, 0.3), "baselines": ("full",)})
    masks = [run.output / "masks" / f"top_{share}.safetensors" for share in (10, 30)]
    for share, mask in zip((10, 30), masks, strict=True):
        assert [m for m in masks if m in found[f"tune_top_{share}_0"].inputs] == [mask]
    assert not set(masks) & set(found["tune_full_0"].inputs)


def test_the_gates_get_the_settings_of_stage_2(plan, monkeypatch, tmp_path):
    given: dict[str, Any] = {}

    class StoppedError(Exception):
        pass

    def module(*args, **settings):
        given.update(settings)
        raise StoppedError

    monkeypatch.setattr(stages, "ILAMaskLearning", module)
    loader = type("Rows", (), {"train_dataloader": lambda self: [0]})
    monkeypatch.setattr(stages, "data_module", lambda *_: loader())
    asked = {
        "initial_score": 2.0, "budget": 0.5, "budget_weight": 3.0, "optimizer": "adamw",
        "learning_rate": 0.25,
    }  # fmt: skip
    _, run = plan(stage2=asked)
    with pytest.raises(StoppedError):
        stages.learn_scores(run, "sft", "last", tmp_path)
    assert {name: given[name] for name in asked} == asked and given["loss"] == "sft"


def test_the_share_that_trains_has_no_noise_of_binary_fractions():
    assert [trained(share) for share in (0.7, 0.9, 0.25)] == [0.3, 0.1, 0.75]
