"""Whole ALPS runs on a tiny model: with and without a task model, SFT and DPO, transfer, seeds."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_align.errors import DataError, LocalizationError, MaskError, PipelineError
from lit_align.language_model import load_tokenizer, save_language_model
from lit_align.localizers import head_distance_mask
from lit_align.masks import HeadLayout, ParameterMask
from lit_align.pipelines.alps.settings import BASELINES, ALPSDataSettings, CompareSettings
from lit_align.report import read_metrics_csv
from tests.pipelines.alps_settings import DATA, tiny_alps
from tests.tiny_models import save_tiny_model, tiny_model
from tests.training_runs import random_mask, stored

pytestmark = pytest.mark.usefixtures("_unrendered")  # but for the module's whole run
PAIRS = str(DATA / "preference.jsonl")
LAYOUT = HeadLayout.from_model(tiny_model())  # 2 blocks of 4 heads in 2 groups
TOTAL = tiny_model().num_parameters()
QKV = 2 * (32 + 16 + 16) * 32


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_llama_dir) -> Path:
    """The folder of one run with every baseline."""
    output = tmp_path_factory.mktemp("alps") / "run"
    tiny_alps(tiny_llama_dir, output, compare={"baselines": BASELINES})
    return output


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """The run again, to go on from with other settings."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory) -> Path:
    """A task model of the base, moved in every weight."""
    model = tiny_model()
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-2)
    folder = tmp_path_factory.mktemp("task")
    return save_language_model(
        model, load_tokenizer(save_tiny_model(folder / "base")), folder / "t"
    )


def stages(output: Path) -> dict[str, Any]:
    listed = json.loads((output / "manifest.json").read_text("utf-8"))["stages"]
    return {record["name"]: record for record in listed}


def results(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text("utf-8"))


def mask(output: Path, name: str = "alps") -> ParameterMask:
    return ParameterMask.load(output / "heads" / f"{name}.safetensors")


def heads(output: Path, name: str = "alps") -> dict[str, list[int]]:
    return LAYOUT.chosen_heads(mask(output, name).selections)


def count(heads: dict[str, list[int]]) -> int:
    return sum(map(len, heads.values()))


# ---- one whole run -------------------------------------------------------------------------------


def test_all_stages_are_done(whole):
    variants = ["no_attention", "alps", "random", "layer_consistent", "lora"]
    assert list(stages(whole)) == ["data", "base", "task", "heads"] + [
        f"tune_{name}_0" for name in variants
    ]
    assert list(results(whole)["variants"]) == ["full", *variants]


def test_the_heads_are_those_that_the_task_training_moved_furthest(whole, tiny_llama_dir):
    expected = head_distance_mask(tiny_llama_dir, whole / "task" / "model", 0.25)
    assert mask(whole) == expected and count(heads(whole)) == 2
    found = results(whole)["heads"]
    assert found["scores"] == expected.metadata.extra["head_scores"]
    assert found["masks"]["alps"]["heads"] == heads(whole)


def test_baselines_train_as_many_heads(whole):
    assert count(heads(whole, "random_0")) == 2
    assert sorted(map(len, heads(whole, "layer_consistent_0").values())) == [1, 1]
    assert count(heads(whole, "no_attention")) == 0
    rows = results(whole)["variants"]
    assert [rows[name]["heads"] for name in rows] == [8, 0, 2, 2, 2, None]


def test_variants_train_what_their_masks_say(whole):
    rows = results(whole)["variants"]
    assert rows["full"]["trained_parameters"] == TOTAL
    assert rows["no_attention"]["trained_parameters"] == TOTAL - QKV
    logs = [whole / name / "logs" / "metrics.csv" for name in ("task", "tune_lora_0")]
    task, lora = (max(read_metrics_csv(log)["learning_rate"][1]) for log in logs)
    assert lora == pytest.approx(10 * task)  # adapters have a learning rate of their own
    # Rank 2 on q, k and v of two blocks.
    assert rows["lora"]["trained_parameters"] == 2 * 2 * (32 + 32 + 2 * (32 + 16))
    for name in ("alps", "random", "layer_consistent"):
        file = name if name == "alps" else f"{name}_0"
        shares = rows[name]["attention_shares"]
        assert rows[name]["trained_parameters"] == mask(whole, file).count()
        assert rows[name]["trained_parameters"] == TOTAL - round(QKV * (1 - shares["qkv"]))
        assert shares["q"] == 0.25 and shares["qkv"] >= 0.25  # groups train whole


def test_heads_outside_the_mask_did_not_move(whole, tiny_llama_dir):
    """Weight decay included: the delta holds what moved, and only the chosen heads are in it."""
    from lit_align.compact.delta import Delta

    delta = Delta.load(whole / "tune_alps_0" / "change" / "delta.safetensors")
    assert delta.mask == mask(whole)
    assert mask(whole).selections["model.layers.0.self_attn.o_proj.weight"].kind == "all"
    base = stored(tiny_llama_dir)
    q = "model.layers.0.self_attn.q_proj.weight"
    values = dict(delta.values)
    if delta.mask.selections[q].kind != "none":
        assert not torch.equal(values[q], base[q][delta.mask.dense(q)])


def test_every_variant_is_measured_on_the_same_validation_rows(whole):
    found = results(whole)
    assert found["base"]["validation_rows"] == 2
    losses = [row["validation_loss"] for row in found["variants"].values()]
    assert all(loss is not None for loss in losses) and len(set(losses)) == len(losses)
    assert found["base"]["validation_loss"] not in losses
    for name, row in found["variants"].items():
        assert row["seconds"] > 0 and row["seeds"] == [0], name


def test_the_report_has_tables_pictures_and_notes(whole):
    report = (whole / "report.html").read_text("utf-8")
    for words in ("ALPS", "no attention head", "share of q", "query heads share their keys",
                  "trained once", "Chosen heads", "wasserstein of projection"):  # fmt: skip
        assert words in report, words
    # Losses; block × module, scores, the chosen heads, densities.
    assert report.count("data:image/svg+xml") == 5
    for words in ("selected by block and module", "density of the rows", "sft.jsonl"):
        assert words in report, words
    assert "http://" not in report and "https://" not in report


def test_a_second_run_does_nothing_and_a_new_baseline_repeats_no_other(copy, tiny_llama_dir):
    before = stages(copy)
    tiny_alps(tiny_llama_dir, copy, compare={"baselines": BASELINES})
    assert stages(copy) == before
    tiny_alps(tiny_llama_dir, copy, compare={"baselines": ("full", "random"), "seeds": 2})
    after = stages(copy)
    for name in ("data", "base", "task", "tune_alps_0", "tune_random_0"):
        assert after[name] == before[name], name
    assert {"tune_full_1", "tune_alps_1", "tune_random_1"} <= set(after)
    assert heads(copy, "random_0") != heads(copy, "random_1")
    row = results(copy)["variants"]["random"]
    assert row["seeds"] == [0, 1] and row["lowest"] < row["highest"]
    assert row["validation_loss"] == pytest.approx(sum(row["validation_losses"]) / 2)
    drawn = [results(copy)["heads"]["masks"][f"random_{seed}"]["shares"] for seed in (0, 1)]
    for part, share in row["attention_shares"].items():
        assert share == pytest.approx((drawn[0][part] + drawn[1][part]) / 2), part
    trained = [mask(copy, f"random_{seed}").count() for seed in (0, 1)]
    assert row["trained_parameters"] == round(sum(trained) / 2)


# ---- other ways ----------------------------------------------------------------------------------


def test_a_given_task_model_and_frozen_others(tiny_llama_dir, task_dir, tmp_path):
    locate = {"others": "freeze", "representation": "qkv", "metric": "kl_divergence"}
    compare = {"baselines": ("full",), "keep": "model"}
    tiny_alps(tiny_llama_dir, tmp_path / "run", task_model=str(task_dir), locate=locate,
              compare=compare)  # fmt: skip
    output = tmp_path / "run"
    assert "task" not in stages(output)
    expected = head_distance_mask(
        tiny_llama_dir, task_dir, 0.25, "qkv", "kl_divergence", others="freeze"
    )
    assert mask(output) == expected
    rows = results(output)["variants"]
    assert rows["full"]["trained_parameters"] == QKV  # all heads, and nothing else
    assert rows["alps"]["trained_parameters"] == expected.count()
    base, after = stored(tiny_llama_dir), stored(output / "tune_alps_0" / "model")
    for name, weight in after.items():
        moved = (weight != base[name]) & ~expected.dense(name)
        assert not moved.any(), name


def test_heads_are_taken_to_other_rows(whole, tiny_llama_dir, tmp_path):
    output = tmp_path / "run"
    data = {"train_files": (PAIRS,), "objective": "dpo"}
    given = str(whole / "heads" / "alps.safetensors")
    tiny_alps(tiny_llama_dir, output, heads=given, data=data, locate={"o_proj": "freeze"})
    assert "task" not in stages(output) and heads(output) == heads(whole)
    selections = mask(output).selections
    assert selections["model.layers.0.self_attn.o_proj.weight"].kind == "none"
    assert selections["model.layers.0.mlp.up_proj.weight"].kind == "all"
    assert results(output)["heads"]["scores"] == results(whole)["heads"]["scores"]
    assert "They come from" in " ".join(results(output)["notes"])


# ---- bad input -----------------------------------------------------------------------------------


def test_settings_that_contradict_each_other_are_refused(tiny_llama_dir, task_dir, tmp_path):
    with pytest.raises(PipelineError, match="give one of the two"):
        tiny_alps(tiny_llama_dir, tmp_path, task_model=str(task_dir), heads="mask")
    frozen = {"others": "freeze"}
    with pytest.raises(PipelineError, match="nothing trains"):
        tiny_alps(tiny_llama_dir, tmp_path, locate=frozen, compare={"baselines": ("no_attention",)})
    with pytest.raises(PipelineError, match="validation"):
        ALPSDataSettings(validation_fraction=0.0)
    with pytest.raises(PipelineError, match=r"compare\.lora\.layers is not for you"):
        lora = CompareSettings().lora
        CompareSettings(lora=type(lora)(layers=["q_proj"]))
    with pytest.raises(PipelineError, match=r"locate\.ratio"):
        tiny_alps(tiny_llama_dir, tmp_path, locate={"ratio": 0.0})


def test_fewer_rows_than_a_batch_are_refused(tiny_llama_dir, tmp_path):
    with pytest.raises(DataError, match=r"8 train row\(s\), less than one batch"):
        tiny_alps(tiny_llama_dir, tmp_path, train={"batch_size": 9})


def test_models_and_masks_that_do_not_fit_are_refused(tiny_llama_dir, tmp_path):
    other = save_tiny_model(tmp_path / "gpt2", "gpt2")
    with pytest.raises(LocalizationError, match="LlamaForCausalLM"):
        tiny_alps(tiny_llama_dir, tmp_path / "a", task_model=str(other))
    with pytest.raises(LocalizationError, match="above zero"):
        tiny_alps(tiny_llama_dir, tmp_path / "b", task_model=str(tiny_llama_dir))
    random_mask(kind="gpt2").save(tmp_path / "foreign")
    with pytest.raises(MaskError, match="does not have"):
        tiny_alps(tiny_llama_dir, tmp_path / "c", heads=str(tmp_path / "foreign"))
    random_mask().save(tmp_path / "elements")
    with pytest.raises(MaskError, match="no whole attention head"):
        tiny_alps(tiny_llama_dir, tmp_path / "d", heads=str(tmp_path / "elements"))
