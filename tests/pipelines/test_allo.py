"""Whole runs on a tiny model: all kinds of data, token weights and masks; resuming; results."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lit_align.compact import Delta
from lit_align.masks import ParameterMask
from lit_align.pipelines.allo import stages as allo_stages
from tests.pipelines.allo_settings import tiny_allo

pytestmark = pytest.mark.usefixtures("_unrendered")  # but for the module's whole run
ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "configs" / "data"
STAGES = [
    "data", "sft", "sample", "pairs", "warm_up", "locate", "corrections", "token_rewards",
    "forget", "improve", "export", "evaluate_base", "evaluate_sft", "evaluate_dpo",
    "evaluate_allo",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_llama_dir) -> tuple[Path, dict[str, torch.Tensor]]:
    """The folder of one run with every stage, and the model's weights as training left them."""
    output = tmp_path_factory.mktemp("allo") / "run"
    trained: dict[str, torch.Tensor] = {}

    def spy(model: Any, path: Path, mask: ParameterMask | None = None) -> None:
        trained.update({n: t.detach().clone() for n, t in model.state_dict().items()})
        export(model, path, mask)

    export = allo_stages.export_delta
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allo_stages, "export_delta", spy)
        tiny_allo(tiny_llama_dir, output, merge_model=True)
    return output, trained


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """The run again, to go on from with other settings."""
    return Path(shutil.copytree(whole[0], tmp_path / "run"))


def stages(output: Path) -> dict[str, Any]:
    listed = json.loads((output / "manifest.json").read_text("utf-8"))["stages"]
    return {record["name"]: record for record in listed}


def rows(output: Path, name: str) -> list[dict[str, Any]]:
    lines = (output / f"{name}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def exported(output: Path) -> ParameterMask:
    return ParameterMask.load(output / "export" / "mask.safetensors")


def write_rows(path: Path, written: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in written), "utf-8")
    return str(path)


# ---- one whole run -------------------------------------------------------------------------


def test_all_stages_are_done(whole):
    assert list(stages(whole[0])) == STAGES


def test_start_and_delta_are_the_trained_model(whole):
    output, trained = whole
    merged = load_file(output / "export" / "model" / "model.safetensors")
    start = load_file(output / "sft" / "model" / "model.safetensors")
    assert merged.keys() == start.keys()
    for name, weight in merged.items():
        assert torch.equal(weight, trained[name]), name


def test_nothing_but_the_selected_moved(whole):
    output, trained = whole
    start = load_file(output / "sft" / "model" / "model.safetensors")
    mask = exported(output)
    moved = 0
    for name in mask.selections:
        selected = mask.dense(name)
        assert torch.equal(trained[name][~selected], start[name][~selected]), name
        moved += int((trained[name] != start[name]).sum())
    assert 0.5 * mask.count() < moved <= mask.count()


def test_the_masks_are_nested_and_the_export_is_their_union(whole):
    output = whole[0]
    n1, n2 = (ParameterMask.load(output / "locate" / f"{n}.safetensors") for n in ("n1", "n2"))
    assert n1.density() == pytest.approx(0.05, abs=1e-4)
    assert n2.density() == pytest.approx(0.1, abs=1e-4)
    assert (n1 & n2).digest == n1.digest
    assert exported(output).digest == (n1 | n2).digest


def test_forgetting_moves_n1_alone_and_improving_goes_on_from_it(whole):
    output = whole[0]
    delta = Delta.load(output / "forget" / "delta.safetensors")
    n1 = ParameterMask.load(output / "locate" / "n1.safetensors")
    assert delta.mask.digest == n1.digest
    start = load_file(output / "sft" / "model" / "model.safetensors")
    changed = sum(
        int((start[name][n1.dense(name)] != values).sum()) for name, values in delta.values.items()
    )
    assert changed > 0.5 * n1.count()


def test_results_and_report_exist(whole):
    results = json.loads((whole[0] / "results.json").read_text("utf-8"))
    assert list(results) == ["base", "sft", "dpo", "allo"]
    assert all(r["low"] <= r["accuracy"] <= r["high"] and r["n"] == 4 for r in results.values())
    mask = exported(whole[0])
    trained = [r["trained_parameters"] for r in results.values()]
    assert trained == [0, mask.total(), mask.total(), mask.count()]
    assert all(results[n]["train_seconds"] > 0 for n in ("sft", "dpo", "allo"))
    html = (whole[0] / "report.html").read_text("utf-8")
    assert "evaluate_allo" in html and 'src="http' not in html and 'href="http' not in html


def test_a_second_run_skips_every_stage(whole, tiny_llama_dir, capsys):
    output = whole[0]
    before = {name: record["finished_at"] for name, record in stages(output).items()}
    tiny_allo(tiny_llama_dir, output, merge_model=True)
    assert capsys.readouterr().out.count("done before, skipped") == len(STAGES)
    assert {name: record["finished_at"] for name, record in stages(output).items()} == before


def test_another_setting_runs_the_stages_that_depend_on_it(copy, tiny_llama_dir, capsys):
    tiny_allo(tiny_llama_dir, copy, merge_model=True, improve={"beta": 0.2})
    said = capsys.readouterr().out
    ran = [s for s in STAGES if f"[{s}] running again" in said]
    assert ran == ["improve", "export", "evaluate_allo"]


# ---- other settings ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["binary", "soft", "raw"])
def test_a_reward_model_weighs_tokens(kind, copy, tiny_llama_dir):
    tiny_allo(tiny_llama_dir, copy, token_rewards={"kind": kind, "threshold": 0.9})
    weights = [w for row in rows(copy, "token_rewards/weighted") for w in row["token_weights"]]
    assert (copy / "reward_model" / "model" / "model.safetensors").is_file()
    assert all(0 <= w <= 1 for w in weights)
    assert set(weights) <= {0.0, 1.0} if kind == "binary" else any(0 < w < 1 for w in weights)


@pytest.mark.parametrize("method", ["gradient", "random", "magnitude"])
def test_other_ways_to_locate(method, copy, whole, tiny_llama_dir):
    tiny_allo(tiny_llama_dir, copy, locate={"method": method, "num_batches": 2})
    n1, n2 = (ParameterMask.load(copy / "locate" / f"{n}.safetensors") for n in ("n1", "n2"))
    assert n2.metadata.method == method and (n1 & n2).digest == n1.digest
    assert exported(copy).jaccard(exported(whole[0])) < 0.9


@pytest.mark.parametrize("method", ["weight_change", "gradient"])
def test_heads_can_be_located(method, copy, tiny_llama_dir):
    """One head of 8: its q rows, and the k and v rows of its group."""
    tiny_allo(tiny_llama_dir, copy, locate={"granularity": "head", "method": method})
    assert exported(copy).count() == 3 * 8 * 32


@pytest.mark.parametrize(
    ("retain", "loss_type"), [("nll", "token"), ("kl", "token"), ("nll", "sequence")]
)
def test_forgetting_can_retain(retain, loss_type, copy, tiny_llama_dir):
    tiny_allo(tiny_llama_dir, copy, forget={"retain": retain, "loss_type": loss_type})
    logged = (copy / "forget" / "logs" / "metrics.csv").read_text("utf-8")
    assert "retain_loss" in logged.splitlines()[0]


def test_without_forgetting(copy, tiny_llama_dir):
    tiny_allo(tiny_llama_dir, copy, forget={"enabled": False})
    n2 = ParameterMask.load(copy / "locate" / "n2.safetensors")
    assert exported(copy).digest == n2.digest
    read = [given.get("stage") for given in stages(copy)["improve"]["inputs"]]
    assert "locate" in read and "forget" not in read


def test_without_supervised_fine_tuning(tmp_path, tiny_llama_dir):
    results = tiny_allo(tiny_llama_dir, tmp_path, sft={"enabled": False})
    assert list(results) == ["base", "dpo", "allo"]
    assert not (tmp_path / "sft").exists()


@pytest.mark.parametrize("file", ["choices.jsonl", "numbers.jsonl"])
def test_questions(file, tmp_path, tiny_llama_dir):
    """The file's name, and what stands in its rows, are text in the report."""
    written = [json.loads(x) for x in (DATA / file).read_text("utf-8").splitlines()]
    name = write_rows(tmp_path / f"<i>{file}", written)
    data = {"kind": "questions", "train_files": (name,), "train_rows": 5, "held_out_rows": 2}
    results = tiny_allo(tiny_llama_dir, tmp_path / "run", data=data)
    assert results["allo"]["n"] == 2
    sources = results["allo"]["by_source"]
    assert sources == {f"<i>{Path(file).stem}": {"n": 2, "right": 0}}
    html = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert f"&lt;i&gt;{file}" in html and f"<i>{file}" not in html


def test_preference_pairs_are_not_sampled(tmp_path, tiny_llama_dir):
    data = {"kind": "preference", "train_files": (str(DATA / "preference.jsonl"),)}
    data |= {"train_rows": 0, "held_out_rows": 0}
    results = tiny_allo(tiny_llama_dir, tmp_path, data=data)
    assert "sample" not in stages(tmp_path)
    assert len(rows(tmp_path, "pairs/pairs")) == 7  # of 10, every fourth is held out
    assert results["allo"]["n"] == 3


# ---- killed --------------------------------------------------------------------------------


def test_killed_runs_end_in_the_same_result(tmp_path, tiny_llama_dir):
    words = [sys.executable, "-m", "tests.pipelines.allo_script"]
    done = subprocess.run(
        [*words, str(tiny_llama_dir), str(tmp_path), "3"],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("killed after") == 3
    for name in ("delta.safetensors", "mask.safetensors"):
        one, other = (tmp_path / run / "export" / name for run in ("whole", "killed"))
        assert one.read_bytes() == other.read_bytes(), name
    assert not list((tmp_path / "killed").glob(".stage-*"))
