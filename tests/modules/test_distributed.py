"""Two gloo processes end like one, and send selected entries alone."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from lit_align.compact.change import save_change
from lit_align.language_model import load_language_model
from lit_align.localizers import random_scores
from lit_align.localizers.layer_gate import read_scores
from lit_align.masks import ParameterMask, named_shapes, select
from tests.modules.distributed_script import OBJECTIVES, run, run_ranks
from tests.tiny_models import tiny_tokenizer
from tests.training_runs import (
    assert_close_weights,
    assert_equal_figures,
    assert_equal_weights,
    random_mask,
)

KIB = 1024
SHARDED = {"sharded": "swap", "localised_sharded": "dpo"}  # run → the one under DDP that it is like


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> Path:
    """A folder with a model large enough that messages besides its weights do not count."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4000, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("larger")
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    select(random_scores(named_shapes(model), 0), 0.1).save(folder / "mask")
    return folder


@pytest.fixture(scope="module")
def on_two(tiny_llama_dir, larger, tmp_path_factory) -> Path:
    """Folder of the runs on two processes; one start serves them all."""
    folder = tmp_path_factory.mktemp("two")
    random_mask(0.3).save(folder / "mask")
    runs = [
        {"objective": name, "model": str(tiny_llama_dir), "mask": str(folder / "mask")}
        for name in OBJECTIVES
    ]
    # By gradient scores once, where the first batches go through both ranks.
    runs[1] |= {"mask": ""}
    runs.append({"objective": "dpo", "model": str(larger), "mask": str(larger / "mask")})
    names = [*OBJECTIVES, "larger", *SHARDED]
    runs += [runs[names.index(like)] | {"strategy": "sharded"} for like in SHARDED.values()]
    for each, name in zip(runs, names, strict=True):
        each["out"] = str(folder / name)
    run_ranks(2, runs)
    return folder


def figures(folder: Path, rank: int = 0) -> dict:
    return json.loads((folder / f"figures-{rank}.json").read_text())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_processes_equal_one(objective, on_two, tiny_llama_dir, tmp_path):
    mask = "" if objective == "dpo" else str(on_two / "mask")
    run(objective, str(tiny_llama_dir), mask, str(tmp_path), world_size=1)
    one, two = figures(tmp_path), figures(on_two / objective)
    assert one["steps"] == two["steps"] == 6
    assert one["mask"] == two["mask"]
    weights = [load_file(on_two / objective / f"weights-{r}.safetensors") for r in (0, 1)]
    assert_equal_weights(*weights)
    assert_close_weights(load_file(tmp_path / "weights-0.safetensors"), weights[0], atol=1e-6)
    assert_equal_figures(one, two)
    for a, b in zip(records(tmp_path), records(on_two / objective), strict=True):
        for name in ("logp", "ref_logp"):
            assert b.pop(name, 0.0) == pytest.approx(a.pop(name, 0.0), rel=2e-6)
        assert a == b


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "logps.jsonl").read_text().splitlines()]


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes by Linux's /proc")
def test_only_selected_entries_are_sent(on_two, larger):
    dense_bytes = (larger / "model.safetensors").stat().st_size  # in fp32
    for rank in (0, 1):
        found = figures(on_two / "larger", rank)
        gradients = 4 * found["selected"] * found["steps"]
        # A ring of W ranks sends 2 (W − 1) / W of a gradient, of two ranks all of it, once a step;
        # the selected entries themselves go out once at the start.
        allowed = 1.1 * (gradients + 4 * found["selected"]) + 64 * KIB
        assert gradients < found["written_bytes"] < allowed
        assert found["written_bytes"] < gradients + dense_bytes / 4  # no frozen weight went out


@pytest.mark.parametrize("name", SHARDED)
def test_shards_end_like_copies(name, on_two):
    """Swapped base values and a mask by the gradient, both of shards."""
    like, found = figures(on_two / SHARDED[name]), figures(on_two / name)
    weights = [load_file(on_two / name / f"weights-{r}.safetensors") for r in (0, 1)]
    copies = load_file(on_two / SHARDED[name] / "weights-0.safetensors")
    assert_equal_weights(*weights)
    assert_close_weights(copies, weights[0], atol=1e-6)
    assert found["mask"] == like["mask"]
    assert_equal_figures(like, found)
    assert max(figures(on_two / name, r)["numel_here"] for r in (0, 1)) <= 0.51 * found["numel"]


FURTHER = {
    "adamw": {"objective": "adamw"},
    "gates": {"objective": "gates", "mask": "whole"},
    "accumulated": {"accumulate_grad_batches": 2},
    "clipped_by_value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "weight_change": {"mask": "weight_change"},
}


@pytest.fixture(scope="module")
def further(tiny_llama_dir, tmp_path_factory) -> Path:
    """Folder of the further runs, on one process and on two."""
    folder = tmp_path_factory.mktemp("further")
    random_mask(0.3).save(folder / "mask")
    model = load_language_model(tiny_llama_dir)[0]
    g = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=g))
    change = {"module_settings": {"change": str(save_change(model, folder / "change"))}}
    shared = {"objective": "sft", "model": str(tiny_llama_dir), "mask": str(folder / "mask")}
    for ranks in (1, 2):
        runs = [
            shared | case | {"out": str(folder / f"{name}-{ranks}")}
            for name, case in FURTHER.items()
        ]
        runs[1] |= change
        run_ranks(ranks, runs)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("case", FURTHER)
def test_further_runs_equal_one_process(case, further):
    one, two = (further / f"{case}-{ranks}" for ranks in (1, 2))
    assert_equal_figures(figures(one), figures(two))
    assert figures(one)["steps"] == figures(two)["steps"]
    weights = [load_file(run / "weights-0.safetensors") for run in (one, two)]
    assert_close_weights(*weights, atol=1e-6)
    if case == "gates":
        scores = [read_scores(run / "scores.json").layers for run in (one, two)]
        assert len(set(scores[0].values())) > 1  # they have moved
        assert scores[1] == pytest.approx(scores[0], rel=1e-6)
    if case == "weight_change":
        masks = [ParameterMask.load(run / "mask.safetensors") for run in (one, two)]
        assert masks[0].digest == masks[1].digest
