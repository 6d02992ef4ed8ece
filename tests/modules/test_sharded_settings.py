"""Shards under each precision, saving of memory, reference and localisation: like one process."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_align.masks import ParameterMask
from tests.modules.distributed_script import run_ranks
from tests.training_runs import (
    assert_close_weights,
    assert_equal_figures,
    assert_equal_weights,
    random_mask,
)

HALF = {"precision": "bf16-true"}
EXACT = {
    "checkpointing": {"module_settings": {"gradient_checkpointing": True}},
    "selective": {"module_settings": {"gradient_checkpointing": "selective"}},
    "cache": {"objective": "dpo"},
    "reference_free": {"objective": "dpo", "module_settings": {"reference": "none"}},
    "padded": {"data_settings": {"layout": "padded"}},
    "accumulated": {"accumulate_grad_batches": 2},
    "forgetting": {"objective": "npo"},
    "gradient_rows": {"objective": "dpo", "mask": "", "granularity": "row"},
    "gradient_heads": {"objective": "dpo", "mask": "", "granularity": "head"},
    "gradient_layers": {"objective": "dpo", "mask": "", "granularity": "layer"},
    "weight_change": {"objective": "sft", "mask": "weight_change"},
    "torch_adamw": {"objective": "adamw"},
    "clipped_by_value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
}
ROUNDED = {
    "bf16": HALF,
    "mixed": {"precision": "bf16-mixed"},
    "cache_bf16": HALF | {"objective": "dpo"},
    "stochastic_rounding": HALF | {"module_settings": {"stochastic_rounding": True}},
    "selective_bf16": HALF | {"module_settings": {"gradient_checkpointing": "selective"}},
    "gradient_bf16": HALF | {"objective": "dpo", "mask": ""},
    "weight_change_bf16": HALF | {"objective": "sft", "mask": "weight_change"},
    "weight_change_mixed": {
        "objective": "sft",
        "mask": "weight_change",
        "precision": "bf16-mixed",
    },
}
CASES = EXACT | ROUNDED


@pytest.fixture(scope="module")
def runs(tiny_llama_dir, tmp_path_factory) -> Path:
    """Folder of all runs, on one process, and sharded over three: no size divides by that."""
    folder = tmp_path_factory.mktemp("settings")
    random_mask(0.3).save(folder / "mask")
    shared = {"objective": "swap", "model": str(tiny_llama_dir), "mask": str(folder / "mask")}
    for ranks, strategy in ((1, "ddp"), (3, "sharded")):
        given = [
            shared
            | case
            | {"strategy": strategy, "batch": 6, "out": str(folder / f"{name}-{ranks}")}
            for name, case in CASES.items()
        ]
        run_ranks(ranks, given)
    return folder


def figures(folder: Path) -> dict:
    return json.loads((folder / "figures-0.json").read_text())


def both(folder: Path, case: str, what: str) -> list[dict[str, torch.Tensor]]:
    ranks = [load_file(folder / f"{case}-3" / f"{what}-{rank}.safetensors") for rank in (0, 1, 2)]
    assert_equal_weights(ranks[0], ranks[1])
    assert_equal_weights(ranks[0], ranks[2])
    return [load_file(folder / f"{case}-1" / f"{what}-0.safetensors"), ranks[0]]


def masks(folder: Path, case: str) -> list[ParameterMask]:
    return [ParameterMask.load(folder / f"{case}-{n}" / "mask.safetensors") for n in (1, 3)]


@pytest.mark.long
@pytest.mark.parametrize("case", EXACT)
def test_three_shards_equal_one_process(case, runs):
    one, three = (figures(runs / f"{case}-{n}") for n in (1, 3))
    assert_equal_figures(one, three)
    assert one["mask"] == three["mask"] and one["steps"] == three["steps"]
    assert_close_weights(*both(runs, case, "weights"), atol=2e-6)
    if case == "weight_change":
        one, three = masks(runs, case)
        assert one.digest == three.digest


@pytest.mark.long
@pytest.mark.parametrize("case", ROUNDED)
def test_in_16_bits_they_are_as_near_as_its_rounding(case, runs, tiny_llama_dir):
    one, three = (figures(runs / f"{case}-{n}") for n in (1, 3))
    for name in ("loss", "eval_loss"):
        assert three[name] == pytest.approx(one[name], rel=1e-3), name
    alone, sharded = both(runs, case, "weights")
    assert {t.dtype for t in sharded.values()} == {t.dtype for t in alone.values()}
    base = load_file(tiny_llama_dir / "model.safetensors")
    base = {
        name: base.get(name, base["model.embed_tokens.weight"]).to(t) for name, t in alone.items()
    }
    assert distance(alone, sharded) < 0.05 * distance(alone, base)
    if case.startswith("weight_change"):
        one, three = masks(runs, case)
        assert (one & three).count() > 0.98 * one.count() == 0.98 * three.count()


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return sum(float((a[name].float() - b[name].float()).abs().sum()) for name in a)
