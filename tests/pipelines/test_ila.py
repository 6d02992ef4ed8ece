"""Whole ILA runs on a tiny model: LoRA and full, SFT and DPO, several data sets, transfer."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lit_align.compact.adapters import AdapterSettings
from lit_align.data import SFTDataModule
from lit_align.data.schema import TokenizedRow, TokenizedSequence
from lit_align.errors import DataError, LocalizationError, MaskError, ModelError, PipelineError
from lit_align.language_model import load_tokenizer
from lit_align.localizers.layer_gate import LayerScores, read_scores
from lit_align.masks import ParameterMask
from lit_align.masks.linear_layers import linear_layers
from lit_align.pipelines.ila.data import _check_batches, as_ids
from lit_align.pipelines.ila.run import ILARun
from lit_align.pipelines.ila.variants import choices
from tests.pipelines.ila_settings import DATA, TINY, tiny_ila
from tests.tiny_models import save_tiny_model, tiny_model

SFT, PAIRS = str(DATA / "sft.jsonl"), str(DATA / "preference.jsonl")
pytestmark = pytest.mark.usefixtures("_unrendered")  # but for the module's whole run
SEARCH = ["data", "layers", "change_sft", "scores_sft_last", "masks", "base"]
LAYERS = list(linear_layers(tiny_model()))  # 2 blocks of 7, and the tied head


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_llama_dir) -> Path:
    """The folder of one run with every kind of variant."""
    output = tmp_path_factory.mktemp("ila") / "run"
    baselines = ("full", "all", "random", "first", "last", "adalora")
    use = {"freeze": (0.25,), "baselines": baselines, "epochs": 2}
    tiny_ila(tiny_llama_dir, output, use=use)
    return output


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """The run again, to go on from with other settings."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def stages(output: Path) -> dict[str, Any]:
    listed = json.loads((output / "manifest.json").read_text("utf-8"))["stages"]
    return {record["name"]: record for record in listed}


def results(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text("utf-8"))


def selected(output: Path, mask: str) -> list[str]:
    found = ParameterMask.load(output / "masks" / f"{mask}.safetensors")
    kinds = {name: s.kind for name, s in found.selections.items()}
    assert set(kinds.values()) <= {"all", "none"}
    return [name for name in LAYERS if kinds.pop(name) == "all"] + [
        name for name, kind in kinds.items() if kind == "all"
    ]


def scores_of(output: Path, stage: str = "scores_sft_last") -> LayerScores:
    return read_scores(output / stage / "scores.json")


def write_scores(path: Path, layers: list[str], **more: Any) -> str:
    values = {name: 4.0 + i / 8 for i, name in enumerate(layers)}
    return str(LayerScores(values, **more).write(path))


# ---- one whole run -------------------------------------------------------------------------


def test_all_stages_are_done(whole):
    variants = ["full", "all", "adalora", "freeze_25", "top_30", "random_1_freeze_25",
                "random_2_freeze_25", "first_freeze_25", "last_freeze_25"]  # fmt: skip
    assert list(stages(whole)) == SEARCH + [f"tune_{name}_0" for name in variants]
    assert list(results(whole)["variants"]) == variants


def test_the_prepared_rows_are_the_file_s_tokens_split_once(whole, tiny_llama_dir):
    source = SFTDataModule(str(tiny_llama_dir), SFT)
    source.setup("fit")
    parts = [SFTDataModule(str(tiny_llama_dir), str(whole / "data" / name)) for name in
             ("sft/train.jsonl", "validation.jsonl")]  # fmt: skip
    for part in parts:
        part.setup("fit")

    def tokens(module: SFTDataModule) -> list[tuple[list[int], list[int]]]:
        rows = (row.sequences[0] for row in module.train_rows)
        return [(s.prompt_ids.tolist(), s.response_ids.tolist()) for s in rows]

    train, validation = map(tokens, parts)
    assert len(train) == 8 and len(validation) == 2
    assert sorted(train + validation) == sorted(tokens(source))


def test_every_layer_has_a_score_that_moved(whole):
    scores = scores_of(whole)
    assert sorted(scores.layers) == sorted(LAYERS) and scores.steps == 3
    assert scores.loss == "sft" and all(s != 4.0 for s in scores.layers.values())


def test_masks_hold_the_layers_that_the_scores_rank_highest(whole):
    ranking = scores_of(whole).ranking()
    assert set(selected(whole, "top_30")) == set(ranking[:5])  # ceil(0.3 · 15)
    assert set(selected(whole, "freeze_25")) == set(ranking[:12])  # ceil(0.75 · 15)


def test_baselines_freeze_as_many_layers(whole):
    assert selected(whole, "first_freeze_25") == LAYERS[3:]
    assert selected(whole, "last_freeze_25") == LAYERS[:-3]
    draws = [set(selected(whole, f"random_{i}_freeze_25")) for i in (1, 2)]
    assert [len(draw) for draw in draws] == [12, 12] and draws[0] != draws[1]
    assert selected(whole, "all") == LAYERS


def test_a_variant_trains_the_adapters_of_its_layers(whole):
    rows = results(whole)["variants"]
    shapes = {name: p.shape for name, p in tiny_model().named_parameters()}

    def adapters(names: list[str]) -> int:
        return sum(2 * sum(shapes[name]) for name in names)  # rank 2

    for name in ("top_30", "first_freeze_25", "all"):
        chosen = selected(whole, name)
        assert rows[name]["trained_parameters"] == adapters(chosen), name
        assert rows[name]["layers"] == len(chosen)
    assert rows["full"]["trained_parameters"] == tiny_model().num_parameters()


def test_every_variant_is_measured_on_the_same_validation_rows(whole):
    found = results(whole)
    assert found["base"]["validation_rows"] == 2
    before = found["base"]["validation_loss"]
    for name, row in found["variants"].items():
        assert row["validation_loss"] is not None and row["validation_loss"] != before, name
        assert row["seconds"] > 0 and row["seeds"] == [0]
    for folder in whole.glob("tune_*"):
        assert json.loads((folder / "metrics.json").read_text())["train_rows"] == 8


def test_the_report_has_tables_pictures_and_notes(whole):
    report = (whole / "report.html").read_text("utf-8")
    for words in ("every layer (AdaLoRA)", "lowest 25 % frozen", "random 2: 25 % frozen",
                  "was never met", "two random selections differ"):  # fmt: skip
        assert words in report, words
    assert report.count("data:image/svg+xml") == 2 + 3  # ranks, the top; three families of curves
    assert "http://" not in report and "https://" not in report


def test_a_second_run_does_nothing(copy, tiny_llama_dir, capsys):
    before = stages(copy)
    use = {"freeze": (0.25,), "epochs": 2,
           "baselines": ("full", "all", "random", "first", "last", "adalora")}  # fmt: skip
    tiny_ila(tiny_llama_dir, copy, use=use)
    assert stages(copy) == before
    assert capsys.readouterr().out.count("skipped") == len(before)


def test_another_share_trains_one_variant_more(copy, tiny_llama_dir, capsys):
    use = {"freeze": (0.25,), "epochs": 2, "top": (0.1, 0.3), "baselines": ("all",)}
    tiny_ila(tiny_llama_dir, copy, use=use)
    lines = capsys.readouterr().out.splitlines()
    assert [x for x in lines if "[tune_" in x and "running" in x] == ["[tune_top_10_0] running"]
    again = [x for x in lines if "running again" in x]
    assert again == ["[masks] running again: variants changed"]


def test_other_gates_rank_again_and_repeat_no_baseline(copy, tiny_llama_dir, capsys):
    use = {"freeze": (0.25,), "epochs": 2, "baselines": ("first",)}
    tiny_ila(tiny_llama_dir, copy, stage2={"initial_score": 1.0}, use=use)
    lines = capsys.readouterr().out.splitlines()
    assert "[change_sft] done before, skipped" in lines
    assert "[scores_sft_last] running again: initial_score changed" in lines
    assert "[tune_first_freeze_25_0] done before, skipped" in lines


# ---- other kinds of runs -------------------------------------------------------------------


def test_full_dpo_on_two_data_sets_at_two_milestones(tiny_llama_dir, tmp_path):
    other = tmp_path / "preference.jsonl"  # the same name as the other's: they are numbered
    rows = Path(PAIRS).read_text("utf-8").splitlines()
    other.write_text("\n".join(rows[:6]) + "\n", "utf-8")
    found = tiny_ila(
        tiny_llama_dir,
        tmp_path / "run",
        data={"train_files": (PAIRS,), "search_files": (PAIRS, str(other)), "objective": "dpo"},
        stage1={"method": "full", "until": "milestones", "milestones": (0.01, 1.0)},
        stage2={"milestones": (1.0, 0.01), "batches": 2},
        use={"method": "full", "top": (0.2,), "freeze": (0.25,)},
    )
    run = tmp_path / "run"
    names = ["preference", "preference_2"]
    assert list(found["variants"]) == [
        *(f"{name}_{use}" for name in names for use in ("freeze_25", "top_20")),
        "shared_freeze_25",
    ]
    tops = [set(scores_of(run, f"scores_{name}_100").ranking()[:12]) for name in names]
    assert set(selected(run, "shared_freeze_25")) == tops[0] | tops[1]
    shapes = {name: p.numel() for name, p in tiny_model().named_parameters()}
    trained = found["variants"]["shared_freeze_25"]["trained_parameters"]
    assert trained == sum(shapes[name] for name in tops[0] | tops[1])
    between = found["overlap"]
    assert list(between) == ["rankings", *(f"milestones of {name}" for name in names)]
    common = len(tops[0] & tops[1])
    assert between["rankings"]["jaccard"][0][1] == pytest.approx(common / (24 - common))
    # two random sets of 12 of 15: at least 9 are common, and 4.8/12 · 12 = 9.6 are expected
    assert between["rankings"]["random"][0][1] == pytest.approx(0.6700, abs=2e-3)
    assert scores_of(run, "scores_preference_1").loss == "dpo"
    report = (run / "report.html").read_text("utf-8")
    assert "Random rankings would have 0.67" in report and "milestones of preference_2" in report


def test_a_ranking_of_another_architecture_without_a_search(tiny_llama_dir, tmp_path):
    names = [n for n in linear_layers(tiny_model(tied=False)) if "v_proj" not in n]
    unscored = ("model.layers.0.self_attn.k_proj.weight",)  # its place is not block 1's
    theirs = [n for n in names if n not in unscored]
    file = write_scores(
        tmp_path / "theirs.json", theirs, base_fingerprint="another", unscored=unscored
    )
    found = tiny_ila(
        tiny_llama_dir,
        tmp_path / "run",
        stage1={"enabled": False},
        use={"transfer": file, "top": (0.3,)},
    )
    assert list(stages(tmp_path / "run")) == [
        "data", "layers", "masks", "base", "tune_transferred_top_30_0",
    ]  # fmt: skip
    moved = found["transferred"]
    assert moved["sources"]["model.embed_tokens.weight"] == "lm_head.weight"
    assert sorted(moved["unmatched"]) == [
        *unscored, *(f"model.layers.{i}.self_attn.v_proj.weight" for i in (0, 1)),
    ]  # fmt: skip
    # the last 4 of 12 scores are the highest
    assert selected(tmp_path / "run", "transferred_top_30") == LAYERS[-4:]
    assert any("v_proj" in note and "stay frozen" in note for note in found["notes"])


def test_rankings_of_this_model_that_were_found_before(tiny_llama_dir, whole, tmp_path):
    given = str(whole / "scores_sft_last" / "scores.json")
    tiny_ila(tiny_llama_dir, tmp_path / "run", stage1={"enabled": False}, use={"scores": (given,)})
    assert selected(tmp_path / "run", "top_30") == selected(whole, "top_30")


def test_a_given_change_is_ranked_and_saturated_gates_are_told(tiny_llama_dir, whole, tmp_path):
    change = str(whole / "change_sft" / "change")
    found = tiny_ila(
        tiny_llama_dir,
        tmp_path / "run",
        stage1={"change": (change,)},
        stage2={"initial_score": 12.0, "learning_rate": 1e-3},
        use={"top": ()},
    )
    assert list(stages(tmp_path / "run")) == [s for s in SEARCH if s != "change_sft"]
    assert found["rankings"]["sft"]["saturated"] and found["variants"] == {}
    assert any("every gate is saturated" in note for note in found["notes"])
    assert "every gate is saturated" in (tmp_path / "run" / "report.html").read_text("utf-8")


def test_stage_1_stops_where_it_is_stable(tiny_llama_dir, tmp_path):
    found = tiny_ila(
        tiny_llama_dir,
        tmp_path / "run",
        stage1={"epsilon": 1e3, "window": 1, "epochs": 4},
        use={"top": ()},
    )
    assert found["stage1"]["sft"]["stable"] and found["stage1"]["sft"]["steps"] < 8
    assert any("ε-stable after" in note for note in found["notes"])


def test_several_seeds_make_a_range(tiny_llama_dir, whole, tmp_path):
    given = str(whole / "scores_sft_last" / "scores.json")
    found = tiny_ila(
        tiny_llama_dir,
        tmp_path / "run",
        stage1={"enabled": False},
        use={"scores": (given,), "seeds": 2},
    )
    row = found["variants"]["top_30"]
    assert row["seeds"] == [0, 1] and row["lowest"] < row["validation_loss"] < row["highest"]


# ---- bad input -----------------------------------------------------------------------------


def test_a_data_set_smaller_than_a_batch(tiny_llama_dir, tmp_path):
    with pytest.raises(DataError, match=r"sft.jsonl: 8 train row.*stage1.batch_size 9"):
        tiny_ila(tiny_llama_dir, tmp_path / "run", stage1={"batch_size": 9})
    with pytest.raises(DataError, match=r"8 train row.*stage2.batch_size 10"):
        tiny_ila(tiny_llama_dir, tmp_path / "run", stage2={"batch_size": 10})
    with pytest.raises(DataError, match=r"8 train row.*use.batch_size 9"):
        tiny_ila(tiny_llama_dir, tmp_path / "run", use={"batch_size": 9})


def test_rows_that_are_trained_on_together_are_counted_together(tmp_path):
    small = str(tmp_path / "small.jsonl")
    settings: dict[str, Any] = TINY | {"output": tmp_path, "model": "nowhere"}
    settings["machine"] = settings.pop("run")
    counts = {SFT: 8, small: 1}
    both = dataclasses.replace(TINY["data"], train_files=(SFT, small))
    _check_batches(ILARun(**settings | {"data": both}), counts)
    apart = ILARun(**settings | {"data": dataclasses.replace(both, search_files=(small,))})
    with pytest.raises(DataError, match=r"/small.jsonl: 1 train row.*stage1.batch_size 4"):
        _check_batches(apart, counts)
    change = dataclasses.replace(TINY["stage1"], change=("given",))
    with pytest.raises(DataError, match=r"/small.jsonl: 1 train row.*stage2.batch_size 4"):
        _check_batches(dataclasses.replace(apart, stage1=change), counts)


def test_files_called_like_a_baseline_are_numbered(tmp_path):
    data = dataclasses.replace(TINY["data"], search_files=("random_1.jsonl", "First.jsonl"))
    use = dataclasses.replace(
        TINY["use"], scores=("transferred.json", "shared.json"), transfer="other.json",
        freeze=(0.25,), baselines=("random", "first", "last"),
    )  # fmt: skip
    groups = {name: TINY[name] for name in ("stage1", "stage2")}
    run = ILARun(tmp_path, "nowhere", data=data, use=use, machine=TINY["run"], **groups)
    assert list(run.rankings()) == ["random_1_2", "First_2", "transferred_2", "shared_2"]
    names = [choice.name for choice in choices(run)]
    assert len(set(names)) == len(names) == 4 * 2 + 1 + 2 + 4


def test_a_share_without_validation_rows_names_the_file(tiny_llama_dir, tmp_path):
    with pytest.raises(DataError, match=r"sft.jsonl: the validation split"):
        tiny_ila(tiny_llama_dir, tmp_path / "run", data={"validation_fraction": 0.01})


def test_a_change_of_another_tokenizer(tiny_llama_dir, tmp_path):
    change = save_tiny_model(tmp_path / "task")
    tokenizer = load_tokenizer(change)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(change)
    with pytest.raises(LocalizationError, match=r"tokenizers .* differ.*'<new>'"):
        tiny_ila(tiny_llama_dir, tmp_path / "run", stage1={"change": (str(change),)})


def test_a_change_of_another_architecture(tiny_llama_dir, tmp_path):
    change = save_tiny_model(tmp_path / "task", kind="gpt2")
    with pytest.raises(LocalizationError, match=r"Llama.*task a GPT2"):
        tiny_ila(tiny_llama_dir, tmp_path / "run", stage1={"change": (str(change),)})


def test_qlora_that_cannot_run_is_told_before_the_search(tiny_llama_dir, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else find(n, *a)
    )
    with pytest.raises(ModelError, match=r"bitsandbytes.*lit-align\[qlora\]"):
        tiny_ila(tiny_llama_dir, tmp_path / "run", use={"method": "qlora"})
    assert list(stages(tmp_path / "run")) == ["data"]


def test_a_transfer_without_a_common_name(tiny_llama_dir, tmp_path):
    file = write_scores(tmp_path / "theirs.json", list(linear_layers(tiny_model("gpt2"))))
    with pytest.raises(MaskError, match=r"attn.c_attn.*q_proj"):
        tiny_ila(
            tiny_llama_dir, tmp_path / "run", stage1={"enabled": False}, use={"transfer": file}
        )


def test_scores_of_another_model_are_refused(tiny_llama_dir, tmp_path):
    file = write_scores(tmp_path / "theirs.json", LAYERS, base_fingerprint="another")
    with pytest.raises(MaskError, match="fingerprint another"):
        tiny_ila(
            tiny_llama_dir, tmp_path / "run", stage1={"enabled": False}, use={"scores": (file,)}
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"train_files": ()}}, "data.train_files is empty"),
        ({"stage1": {"enabled": False}}, "there is no ranking to use"),
        ({"stage1": {"change": ("a", "b")}}, "2 folder.* for 1 data set.*sft"),
        ({"stage2": {"milestones": (0.5,)}}, "set stage1.until milestones"),
        (
            {"stage1": {"until": "milestones"}, "stage2": {"milestones": (0.3,)}},
            r"\[0.3\], and stage 1 keeps \(0.01, 0.25",
        ),
        ({"stage1": {"milestones": (0.5, 0.25)}}, "stage1.milestones .* rise"),
        ({"stage2": {"budget": 1.5}}, "stage2.budget is 1.5"),
        ({"use": {"max_length": 512}}, "set data.max_length in place of use.max_length"),
        ({"use": {"top": (0.0,)}}, "use.top"),
        ({"use": {"top": (0.3, 0.3)}}, "use.top .* given once each"),
        ({"use": {"freeze": (1.0,)}}, "use.freeze"),
        ({"data": {"validation_fraction": 0.0}}, "give data.validation_files"),
        (
            {"use": {"adapter": AdapterSettings(quantization="nf4")}},
            "use.adapter.quantization is not for you to set",
        ),
    ],
)
def test_settings_that_contradict_each_other(changes, words, tmp_path):
    with pytest.raises(PipelineError, match=words):
        tiny_ila("nowhere", tmp_path / "run", **changes)


def test_weights_and_pairs_survive_as_token_ids():
    weighted = TokenizedSequence([1, 2], [3, 4], [0.0, 0.5], 0)
    assert as_ids(TokenizedRow(0, (weighted,))) == {
        "prompt_ids": [1, 2], "response_ids": [3, 4], "token_weights": [0.0, 0.5],
    }  # fmt: skip
    pair = TokenizedRow(0, (weighted, TokenizedSequence([1, 2], [5], None, 1)))
    assert as_ids(pair) == {
        "prompt_ids": [1, 2], "chosen_ids": [3, 4], "chosen_token_weights": [0.0, 0.5],
        "rejected_ids": [5],
    }  # fmt: skip
