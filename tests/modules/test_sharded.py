"""FSDP2 through ModelParallelStrategy: shards of every kind of mask, two processes equal one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file

from lit_align.callbacks import KeepMilestones
from lit_align.compact import apply_delta, export_delta
from lit_align.errors import ModelError, TrainingError
from lit_align.language_model import save_language_model
from lit_align.masks import HeadLayout, ParameterMask, conv1d_row_axes, named_shapes, select
from lit_align.masks.granularity import Selection
from lit_align.modules.checkpointed import PREFIX, read_checkpoint
from lit_align.modules.parallel import data_parallel_mesh
from lit_align.pipelines.commands import export
from lit_align.shards import Shard, rows_of_rank
from lit_align_kernels.swap_selected import gather_entries
from tests.modules.distributed_script import ROOT, run, run_ranks
from tests.tiny_models import save_tiny_model, tiny_model, tiny_tokenizer
from tests.training_runs import assert_close_weights, assert_equal_figures, assert_equal_weights

# name → (model, granularity of the mask; None: everything trains)
CASES = {
    "elements": ("llama", "element"),
    "rows": ("llama", "row"),
    "heads": ("llama", "head"),
    "layers": ("llama", "layer"),
    "columns": ("gpt2", "row"),
    "elements_of_experts": ("mixtral", "element"),
    "rows_of_experts": ("mixtral", "row"),
    "whole": ("llama", None),
}
SHARDED = {"objective": "swap", "strategy": "sharded", "batch": 6}


def selections() -> list[Selection]:
    g = torch.Generator().manual_seed(0)
    found = []
    for shape in [(7, 5), (6, 4, 3), (9,), (1, 4), (5, 1)]:
        found += [Selection.of_dense(torch.rand(shape, generator=g) < 0.4), Selection.all(shape)]
        if len(shape) > 1:
            rows = torch.tensor([0, 2, 3])[: shape[0]]
            found.append(Selection.of_rows(shape, rows))
        if len(shape) == 2 and shape[1] > 3:
            found.append(Selection.of_rows(shape, torch.tensor([1, 3]), axis=1))
    return [s for s in found if s.kind != "none"]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_shards_hold_each_selected_entry_once(ranks):
    """Also where a rank has no row, and where none of its rows is selected."""
    for selection in selections():
        entries = selection.entries()
        weight = torch.arange(selection.numel, dtype=torch.float32).reshape(selection.shape)
        chosen, count = gather_entries(weight, entries), 0
        for rank in range(ranks):
            first, last = rows_of_rank(weight.shape[0], rank, ranks)
            rows, shard = weight[first:last], Shard.cut(entries, first, last)
            count += shard.entries.numel
            assert shard.entries.shape == tuple(rows.shape)
            assert torch.equal(shard.take(chosen), gather_entries(rows, shard.entries))
            if entries.kind == "elements":
                dense = selection.dense()[first:last].reshape(-1, max(rows.shape[-1], 1))
                assert shard.entries.row_offsets.diff().tolist() == dense.sum(1).tolist()
        assert count == entries.numel


def test_rows_are_dealt_out_as_torch_chunks_them():
    for count in (1, 5, 6, 7, 9):
        for ranks in (1, 2, 3, 4):
            mine = [rows_of_rank(count, rank, ranks) for rank in range(ranks)]
            chunks = torch.arange(count).chunk(ranks)
            assert [b - a for a, b in mine if b > a] == [len(chunk) for chunk in chunks]


def test_a_tensor_parallel_mesh_is_refused():
    strategy = ModelParallelStrategy()
    strategy._device_mesh = {"data_parallel": torch.empty(1), "tensor_parallel": torch.empty(2)}
    for mesh in strategy._device_mesh.values():
        mesh.size = mesh.numel  # as of a DeviceMesh
    with pytest.raises(TrainingError, match=r"data_parallel_size to 2.*tensor_parallel_size to 1"):
        data_parallel_mesh(SimpleNamespace(strategy=strategy))


def a_mask(kind: str, granularity: str) -> ParameterMask:
    model = tiny_model(kind)
    g = torch.Generator().manual_seed(1)
    scores = {n: torch.rand(s, generator=g) for n, s in named_shapes(model).items()}
    heads = HeadLayout.from_model(model) if granularity == "head" else None
    axes = conv1d_row_axes(model)
    return select(scores, 0.3, granularity=granularity, row_axes=axes, heads=heads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict]:
    """What each case is run with; models and masks are in files."""
    folder = tmp_path_factory.mktemp("sharded")
    for kind in ("llama", "gpt2", "mixtral"):
        save_tiny_model(folder / kind, kind)
    found = {}
    for name, (kind, granularity) in CASES.items():
        mask = "whole"
        if granularity is not None:
            mask = str(folder / f"{name}.mask")
            a_mask(kind, granularity).save(mask)
        found[name] = SHARDED | {"model": str(folder / kind), "mask": mask}
    found["whole"] |= {"objective": "sft"}
    return found


@pytest.fixture(scope="module")
def on_two(runs, tmp_path_factory) -> Path:
    """Folder of the runs on two processes; one start serves them all."""
    folder = tmp_path_factory.mktemp("two")
    given = [settings | {"out": str(folder / name)} for name, settings in runs.items()]
    given = [each | {"counts": True} for each in given]
    given.append(runs["elements"] | {"out": str(folder / "kept"), "keep": True})
    run_ranks(2, given)
    return folder


def figures(folder: Path, rank: int = 0) -> dict:
    return json.loads((folder / f"figures-{rank}.json").read_text())


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case, runs, on_two, tmp_path):
    run(**runs[case] | {"strategy": "ddp"}, out=str(tmp_path), world_size=1)
    one, two = figures(tmp_path), figures(on_two / case)
    weights = [load_file(on_two / case / f"weights-{r}.safetensors") for r in (0, 1)]
    assert_equal_weights(*weights)
    assert_close_weights(load_file(tmp_path / "weights-0.safetensors"), weights[0], atol=2e-6)
    assert one["steps"] == two["steps"] and one["mask"] == two["mask"]
    assert_equal_figures(one, two)


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_a_process_holds_its_share(case, on_two):
    """Of frozen weights, of the selected entries of each parameter, and of their moments."""
    ranks = [figures(on_two / case, rank) for rank in (0, 1)]
    assert sum(rank["numel_here"] for rank in ranks) == ranks[0]["numel"]
    assert sum(rank["selected_here"] for rank in ranks) == ranks[0]["selected"]
    for rank in ranks:
        assert rank["numel_here"] <= 0.51 * rank["numel"]
        assert rank["selected_here"] <= 0.51 * rank["selected"]
        assert rank["moments_here"] == 2 * rank["selected_here"]


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_no_dense_gradient_is_reduced(case, on_two):
    """Frozen weights are gathered, layer by layer; of gradients only the selected entries go."""
    found = figures(on_two / case)
    sent, selected = found["collectives"], 4 * found["selected"] * found["steps"]
    # Each parameter is filled up to a multiple of the ranks.
    assert selected <= sent.pop("_reduce_scatter_base_") <= 1.01 * selected
    if case != "whole":
        assert 1.01 * selected < 4 * found["numel"] * found["steps"] / 2
    gathered = sent.pop("_allgather_base_")
    # What is written through is gathered once after each step, one parameter after the other.
    assert sent.pop("all_gather_into_tensor", 0) <= selected
    assert found["largest"].get("all_gather_into_tensor", 0) <= 4 * found["largest_selected"]
    # A step goes forward twice (the reference first) and backward, an evaluation forward twice.
    assert gathered <= 4 * found["numel"] * (3 * found["steps"] + 2 * 2 * 2)
    others = {name: count for name, count in sent.items() if "tensor" not in name}
    assert sum(others.values()) < 4096, others  # counts, losses, norms


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_checkpoint_of_two_processes_resumes(ranks, runs, on_two, tmp_path):
    """From the middle of the first epoch and of the second."""
    steps = {name: on_two / "kept" / f"{name}.ckpt" for name in ("step=1", "step=3")}
    again = [{"ckpt_path": str(path), "out": str(tmp_path / n)} for n, path in steps.items()]
    run_ranks(ranks, [runs["elements"] | each for each in again])
    uninterrupted = load_file(on_two / "elements" / "weights-0.safetensors")
    untrained = load_file(on_two / "kept" / "train_start-0.safetensors")
    for name, path in steps.items():
        resumed = load_file(tmp_path / name / "weights-0.safetensors")
        assert_close_weights(resumed, uninterrupted, atol=1e-6)
        if ranks == 2:
            assert_equal_weights(resumed, uninterrupted)
        # Lightning restores late under this strategy; training starts from what was saved.
        before, after = (
            load_file(tmp_path / name / f"{at}_start-0.safetensors") for at in ("fit", "train")
        )
        assert_equal_weights(before, untrained)
        saved = read_checkpoint(path)["state_dict"]
        assert_equal_weights(after, {n.removeprefix(PREFIX): t for n, t in saved.items()})


@pytest.mark.long
def test_a_checkpoint_in_one_file_resumes_in_shards(runs, on_two, tmp_path):
    """That of one process, and one that a strategy gathers from its shards."""
    run(
        **runs["elements"] | {"strategy": "ddp", "keep": True},
        out=str(tmp_path / "1"),
        world_size=1,
    )
    gathered = {"strategy": "one_file", "keep": True, "out": str(tmp_path / "3")}
    again = [
        {"ckpt_path": str(tmp_path / n / "step=3.ckpt"), "out": str(tmp_path / f"{n}-again")}
        for n in "13"
    ]
    run_ranks(3, [runs["elements"] | each for each in (gathered, *again)])
    uninterrupted = load_file(on_two / "elements" / "weights-0.safetensors")
    for each in again:
        assert Path(each["ckpt_path"]).is_file()
        resumed = load_file(Path(each["out"]) / "weights-0.safetensors")
        assert_close_weights(resumed, uninterrupted, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_of_two_processes_is_evaluated(ranks, runs, on_two, tmp_path):
    shared = runs["elements"] | {"ckpt_path": str(on_two / "kept" / "step=4.ckpt"), "batch": ranks}
    verbs = [shared | {"verb": v, "out": str(tmp_path / v)} for v in ("validate", "predict")]
    run_ranks(ranks, verbs)
    found = json.loads((tmp_path / "validate" / "validate.json").read_text())
    at_the_end = figures(on_two / "elements")["eval_loss"][-1]
    assert found["eval_loss"] == pytest.approx(at_the_end, rel=1e-6)
    predicted, then = (p / "logps.jsonl" for p in (tmp_path / "predict", on_two / "elements"))
    for a, b in zip(*(p.read_text().splitlines() for p in (predicted, then)), strict=True):
        a, b = json.loads(a), json.loads(b)
        assert a["row_id"] == b["row_id"] and a["logp"] == pytest.approx(b["logp"], rel=2e-6)


@pytest.mark.long
def test_a_checkpoint_of_two_processes_is_exported_by_one(runs, on_two, tmp_path):
    settings = runs["elements"]
    kept = on_two / "kept" / "step=4.ckpt"
    export(str(tmp_path / "model"), checkpoint=str(kept), mask=settings["mask"])
    exported = load_file(tmp_path / "model" / "model.safetensors")
    trained = load_file(on_two / "elements" / "weights-0.safetensors")
    assert_equal_weights(exported, {name: trained[name] for name in exported})


@pytest.mark.long
def test_the_config_runs_on_two_processes(tiny_llama_dir, tmp_path):
    """Started as a user does: Lightning makes the second process. One then validates."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    given = {
        "model.init_args.model": tiny_llama_dir, "trainer.accelerator": "cpu",
        "trainer.precision": "32-true", "trainer.limit_train_batches": 2,
        "trainer.limit_val_batches": 1,
    }  # fmt: skip

    def start(verb: str, ranks: int, **more: str) -> str:
        own = {"trainer.devices": ranks, "trainer.strategy.init_args.data_parallel_size": ranks}
        options = [f"--{name}={value}" for name, value in (given | own | more).items()]
        command = [sys.executable, "-m", "lit_align.cli", verb]
        done = subprocess.run(
            [*command, "--config", "configs/masked_dpo_fsdp.yaml", *options],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    start("fit", 2)
    assert ParameterMask.load(tmp_path / "runs/masked_dpo_fsdp/mask.safetensors").count()
    (kept,) = {path.parent for path in tmp_path.rglob("meta.pt")}
    assert "eval_loss" in start("validate", 1, ckpt_path=str(kept))


def test_what_takes_whole_weights_refuses_a_sharded_model(tmp_path, monkeypatch):
    model = tiny_model("llama")
    mask = ParameterMask.full(named_shapes(model))
    export_delta(model, tmp_path / "before.safetensors", mask)
    monkeypatch.setattr("lit_align.shards.is_sharded", lambda tensor: True)
    for act in (
        lambda: export_delta(model, tmp_path / "delta.safetensors", mask),
        lambda: apply_delta(model, tmp_path / "before.safetensors"),
        lambda: save_language_model(model, tiny_tokenizer(), tmp_path / "model"),
        lambda: KeepMilestones().on_train_start(None, SimpleNamespace(model=model)),
    ):
        with pytest.raises(ModelError, match=r"sharded over processes.*export --checkpoint"):
            act()
    assert [path.name for path in tmp_path.iterdir()] == ["before.safetensors"]
