"""`lit-align bench training` on a tiny model; workers run in this process, which saves imports."""

import dataclasses
import importlib.util
import json
import shutil

import pytest
import torch

from lit_align.cli import main
from lit_align.errors import BenchmarkError
from lit_align.masks import ParameterMask
from lit_align.pipelines.training_bench import launch, methods
from lit_align.pipelines.training_bench.job import SCRATCH, Job, Result
from lit_align.pipelines.training_bench.proofs import Proof
from lit_align.pipelines.training_bench.settings import parser, settings_of
from lit_align.pipelines.training_bench.worker import __main__ as worker
from lit_align.pipelines.training_bench.worker.dense_masked_adamw import DenseMaskedAdamW

DATA = "configs/data/preference.jsonl"
INSTALLED = ("rows", "full", "dense-masked", "torch")


@pytest.fixture
def launched(monkeypatch):
    """The jobs that were done, in this process."""
    jobs = []

    def here(job, folder):
        job.write(folder)
        worker.work(folder)
        shutil.rmtree(folder / SCRATCH)
        jobs.append(job)

    monkeypatch.setattr(launch, "launch", here)
    return jobs


@pytest.fixture
def no_trl(monkeypatch):
    """As if the extra were not installed."""
    find = methods.importlib.util.find_spec
    hide = lambda name: None if name == "trl" else find(name)  # noqa: E731
    monkeypatch.setattr(methods.importlib.util, "find_spec", hide)


def bench(output, model, *words):
    options = ["--data", DATA, "--model", str(model), "--output", str(output), "--threads", "1"]
    options += ["--learning-rate", "1e-3"]  # a tiny model's losses move slowly
    main(["bench", "training", *options, "--size", "tiny", "--device", "cpu", *words])
    return json.loads((output / "training.json").read_text())


def result(**values):
    given = {f.name: None for f in dataclasses.fields(Result)} | {"method": "full"}
    return Result(**given | values)


def test_methods_run_side_by_side(tmp_path, tiny_llama_dir, launched, no_trl, capsys):
    record = bench(tmp_path, tiny_llama_dir, "--methods", *INSTALLED, "trl")
    found = {s["method"]: s for s in record["summaries"]}
    assert list(found) == list(INSTALLED)
    assert list(record["left_out"]) == ["trl"] and "lit-align[bench]" in record["left_out"]["trl"]
    assert record["proof"]["holds"] and record["proof"]["against"] == "torch"
    assert record["proof"]["pairs"] == 4 and len(record["proof"]["losses"]) == 2

    # Everyone saw the same pairs: until the masks tell, the losses are the same.
    for name in ("full", "torch"):
        assert found[name]["losses"] == pytest.approx(found["torch"]["losses"], abs=1e-5)
    assert found["rows"]["losses"][0] == pytest.approx(0.693147, abs=1e-6)
    assert found["rows"]["losses"][1] != found["full"]["losses"][1]

    # fp32 moments of what trains, or of everything and a 16-bit mask.
    model_parameters = found["torch"]["trained_parameters"]
    moments = 8 * model_parameters / 2**20
    for name in ("full", "torch"):
        assert found[name]["optimizer_mib"] == pytest.approx(moments, rel=0.01)
    assert found["rows"]["optimizer_mib"] < 0.13 * moments
    assert found["dense-masked"]["optimizer_mib"] == pytest.approx(1.25 * moments, rel=0.01)
    assert found["dense-masked"]["trained_parameters"] == round(0.1 * model_parameters)
    assert found["rows"]["checkpoint_mib"] < 0.3 * found["torch"]["checkpoint_mib"]

    # The reference's one pass is counted apart, where there is one.
    assert found["torch"]["reference_s"] is None
    assert found["rows"]["reference_s"] > 0
    timed = found["rows"]
    both = 1 / timed["pairs_per_s"] + timed["reference_s"]
    assert 1 / timed["pairs_per_s_with_reference"] == pytest.approx(both)
    pairs = [json.loads(line) for line in (tmp_path / "pairs" / "pairs.jsonl").open()]
    lengths = [
        2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in pairs
    ]
    tokens_a_pair = sum(lengths[2:4]) / 2  # the pairs of the timed step
    assert timed["tokens_per_s"] == pytest.approx(tokens_a_pair * timed["pairs_per_s"])

    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "training.md").read_text()
    assert "| lit-align, 10 % of rows |" in text and "TRL DPOTrainer is left out" in text
    assert "speed x torch" in capsys.readouterr().out
    masks = {
        k: ParameterMask.load(tmp_path / "masks" / f"{k}.safetensors") for k in ("row", "head")
    }
    assert masks["row"].metadata.method == "weight_change"
    assert 0.08 < masks["row"].density() < 0.15  # norms' entries, rows of one, do not crowd it
    assert masks["head"].metadata.granularity == "head"

    # Nothing is run again; another round is.
    launched.clear()
    record = bench(tmp_path, tiny_llama_dir, "--methods", *INSTALLED, "--rounds", "2")
    assert [job.method for job in launched] == list(INSTALLED)
    assert not any(job.saves for job in launched)
    assert [m["round"] for m in record["measurements"]] == [1] * 4 + [2] * 4


def test_what_was_measured_before_an_interruption_is_kept(
    tmp_path, tiny_llama_dir, launched, monkeypatch
):
    words = ("--methods", "torch", "full", "--follow", "0")
    here = launch.launch

    def interrupted(job, folder):
        if job.method == "full":
            raise KeyboardInterrupt
        here(job, folder)

    monkeypatch.setattr(launch, "launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench(tmp_path, tiny_llama_dir, *words)
    record = json.loads((tmp_path / "training.json").read_text())
    assert [m["method"] for m in record["measurements"]] == ["torch"]
    monkeypatch.setattr(launch, "launch", here)
    launched.clear()
    record = bench(tmp_path, tiny_llama_dir, *words)
    assert [job.method for job in launched] == ["full"]
    assert [m["method"] for m in record["measurements"]] == ["torch", "full"]


def test_a_failing_rival_is_left_out_and_lit_align_is_not(
    tmp_path, tiny_llama_dir, launched, monkeypatch, capsys
):
    here = launch.launch

    def fails(job, folder):
        if job.method == broken:
            raise BenchmarkError("no\nmemory")
        here(job, folder)

    monkeypatch.setattr(launch, "launch", fails)
    words = ("--methods", "torch", "full", "--follow", "0")
    broken = "torch"
    record = bench(tmp_path, tiny_llama_dir, *words)
    assert record["left_out"] == {"torch": "memory"}
    assert [m["method"] for m in record["measurements"]] == ["full"]
    broken = "full"
    with pytest.raises(SystemExit):
        bench(tmp_path / "b", tiny_llama_dir, *words)
    assert "no\nmemory" in capsys.readouterr().err


def test_nothing_is_timed_where_the_proof_is_red(
    tmp_path, tiny_llama_dir, launched, no_trl, monkeypatch, capsys
):
    here = launch.launch

    def slower(job, folder):
        rate = 1e-2 if job.method == "torch" else job.learning_rate
        here(dataclasses.replace(job, learning_rate=rate), folder)

    monkeypatch.setattr(launch, "launch", slower)
    with pytest.raises(SystemExit) as stop:
        bench(tmp_path, tiny_llama_dir, "--methods", "full")
    assert stop.value.code == 1
    assert "lit-align is not measured" in capsys.readouterr().err
    assert [job.method for job in launched] == ["full", "torch"]  # the two that are compared
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["measurements"] == [] and record["proof"]["holds"] is False


def test_a_proof_compares_log_probs_and_losses():
    ours = result(reference_logps=[[-10.0, -20.0]], losses=[0.7, 0.6])
    same = result(reference_logps=[[-10.00005, -20.0]], losses=[0.7, 0.6009])
    proof = Proof.of(ours, same)
    assert proof.holds
    assert proof.logps_difference == pytest.approx(5e-6, rel=1e-3)
    assert proof.losses_difference == pytest.approx(9e-4)
    for other in (
        result(reference_logps=[[-10.0, -20.001]], losses=[0.7, 0.6]),
        result(reference_logps=[[-10.0, -20.0]], losses=[0.7, 0.6011]),
        result(reference_logps=[[-10.0, -20.0]], losses=[0.7, float("nan")]),
        result(reference_logps=[[float("nan"), -20.0]], losses=[0.7, 0.6]),
    ):
        assert not Proof.of(ours, other).holds
    with pytest.raises(BenchmarkError, match="same pairs"):
        Proof.of(ours, result(reference_logps=None, losses=[0.7, 0.6]))


def test_dense_masked_adamw_is_adamw_inside_and_decays_outside():
    torch.manual_seed(0)
    values, grads = torch.randn(5, 7), torch.randn(3, 5, 7)
    chosen = torch.rand(5, 7) < 0.3
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    dense, plain = (torch.nn.Parameter(values.clone()) for _ in range(2))
    ours = DenseMaskedAdamW({"w": dense}, {"w": chosen.to(torch.bfloat16)}, **settings)
    torchs = torch.optim.AdamW([plain], **settings)
    for grad in grads:
        dense.grad, plain.grad = grad.clone(), grad.clone()
        ours.step()
        torchs.step()
    torch.testing.assert_close(dense[chosen], plain[chosen])
    torch.testing.assert_close(dense[~chosen], values[~chosen] * (1 - 0.01 * 0.1) ** 3)
    assert ours.state[dense]["exp_avg"].shape == values.shape


def test_wrong_words_are_said_at_once(tmp_path, tiny_llama_dir, capsys):
    def refused(*words):
        with pytest.raises(SystemExit) as stop:
            bench(tmp_path / "out", tiny_llama_dir, *words)
        assert stop.value.code == 1
        return capsys.readouterr().err

    assert "no method 'lora'" in refused("--methods", "lora")
    assert "--steps is 0; at least 1" in refused("--steps", "0")
    missing = refused("--methods", "rows", "--masks", str(tmp_path))
    assert "row.safetensors" in missing and "rows needs" in missing
    assert not (tmp_path / "out").exists()
    few = refused("--follow", "30", "--methods", "full")
    assert "has 10 pairs" in few and "60 are needed" in few


def test_help_names_the_methods(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "training", "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("--masks", "--follow", *methods.METHODS))


def test_settings_of_the_size_give_way_to_options():
    words = ["--data", "x", "--steps", "7", "--methods", "trl", "rows", "trl"]
    settings = settings_of(vars(parser().parse_args(words)))
    assert (settings.steps, settings.warmup_steps, settings.follow) == (7, 1, 20)
    assert settings.methods == ("trl", "rows") and settings.masks is None


def test_jobs_are_read_as_they_were_written(tmp_path):
    job = Job("rows", "m", "p", 3, 2, 512, 1e-6, 1, "cpu", mask="m.safetensors")
    assert Job.read(job.write(tmp_path)) == job
    (tmp_path / "result.json").write_text('{"method": 1}')
    with pytest.raises(BenchmarkError, match="no result of a worker"):
        Result.read(tmp_path)


def test_a_worker_that_fails_tells_why(tmp_path, monkeypatch):
    assert importlib.util.find_spec(f"{launch.WORKER}.__main__").origin == worker.__file__
    monkeypatch.setattr(launch, "WORKER", "json.tool")  # fails at once: what it gets is a folder
    job = Job("torch", "m", "p", 1, 2, 512, 1e-6, 1, "cpu")
    with pytest.raises(BenchmarkError, match=r"torch failed with exit code \d(.|\n)*directory"):
        launch.launch(job, tmp_path)
    assert "directory" in (tmp_path / "logs" / "worker.txt").read_text()


@pytest.mark.long
def test_all_methods_in_processes_of_their_own(tmp_path, tiny_llama_dir):
    pytest.importorskip("trl")
    record = bench(tmp_path, tiny_llama_dir)
    assert record["left_out"] == {}
    assert [s["method"] for s in record["summaries"]] == list(methods.METHODS)
    assert record["proof"]["holds"] and record["proof"]["against"] == "trl-precomputed"
    found = {s["method"]: s for s in record["summaries"]}
    assert all(s["checkpoint_mib"] > 0 for s in found.values())
    for name in ("trl", "trl-precomputed", "full"):
        assert found[name]["losses"] == pytest.approx(found["torch"]["losses"], abs=1e-5)
    assert found["trl-shira"]["trained_parameters"] == found["trl-lora"]["trained_parameters"]
