"""The parts by hand, the shipped architectures, the verb and its errors."""

import json
from collections import Counter

import pytest
import torch

from lit_align.errors import LitAlignError, ModelError, TrainingError
from lit_align.pipelines.plan import plan
from lit_align.planning import (
    PlanSettings,
    StepMemory,
    on_each_device,
    read_config,
    shipped_configs,
    step_memory,
)
from lit_align.planning.masks import planned_mask_of_file
from lit_align.planning.model_configs import weightless_model
from lit_align.planning.tracker import MemoryTracker
from tests.tiny_models import tiny_model
from tests.training_runs import random_mask

SMALL = {"prompt_tokens": 8, "response_tokens": 8}


def test_tracker_by_hand():
    with MemoryTracker() as tracker:
        kept = torch.zeros(256)  # 1024 bytes
        with tracker.counting_as("work"):
            view = (kept + 1)[:2]  # 1024 more, held by the view
            start = tracker.mark()
            kept.add_(1)  # nothing
        assert tracker.live() == {"other": 1024, "work": 1024}
        del view
        assert tracker.live() == {"other": 1024}
        _ = [torch.zeros(64) for _ in range(3)]
        tracker.tag([kept], "kept")
    assert tracker.peak(start) == {"kept": 1024, "work": 1024}
    assert tracker.peak() == {"kept": 1024, "work": 1024}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-3.1-8b", 8_030_261_248),
        ("mistral-7b", 7_241_732_096),
        ("llama-3-70b", 70_553_706_496),
    ],
)
def test_shipped_configs_have_the_published_sizes(name, parameters):
    """From the shapes of one layer: building all 80 takes its time."""
    assert name in shipped_configs()
    config = read_config(name)
    layers, config.num_hidden_layers = config.num_hidden_layers, 1
    with torch.device("meta"):
        model = weightless_model(config, torch.bfloat16)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert sum(p.numel() for p in model.parameters()) + (layers - 1) * layer == parameters


def test_parts_of_rows_in_bf16_by_hand(tiny_llama_dir):
    """A tenth of each parameter's rows: weights 2 bytes; each entry's master, moments, base."""
    settings = PlanSettings(str(tiny_llama_dir), [(8, 8, 8)], mask="rows", precision="bf16-true")
    memory = step_memory(settings)
    parts = memory.persistent
    assert parts["selected entries"] == parts["gradients"] == 4 * memory.trained
    assert parts["base values"] == 2 * memory.trained
    assert 8 * memory.trained <= parts["optimiser moments"] <= 8 * memory.trained + 4 * 100  # steps
    assert 2 * memory.parameters <= parts["weights"] <= 2 * memory.parameters + 1000  # rotary
    assert 0.1 <= memory.trained / memory.parameters < 0.13  # rounded up in every parameter
    assert memory.peak["logits and head"] > 0 and memory.peak["activations"] > 0


@pytest.mark.parametrize("granularity", ["row", "element"])
def test_a_mask_file_is_planned_as_it_is(tiny_llama_dir, tmp_path, granularity):
    mask = random_mask(0.25, granularity)
    mask.save(tmp_path / "mask.safetensors")
    settings = PlanSettings(
        str(tiny_llama_dir), [(8, 8, 8)], mask=str(tmp_path / "mask.safetensors"), device="cpu",
        precision="32-true",
    )  # fmt: skip
    found = planned_mask_of_file(tiny_model(), settings.mask)
    assert found.count() == mask.count()
    name = "model.layers.1.mlp.up_proj.weight"
    rows = [0, 3, 40]
    assert found.selections[name].entries().counts_before(rows) == mask.entries(name).counts_before(
        rows
    )
    assert step_memory(settings).trained == mask.count()


def test_sharding_by_hand(tiny_llama_dir):
    memory = StepMemory(
        persistent=Counter({"weights": 800, "base values": 10}),
        peak=Counter({"weights": 800, "base values": 10, "activations": 50}),
        parameters=400, trained=40, trained_bytes=160, largest_block_bytes=100, outside_bytes=30,
    )  # fmt: skip
    name = str(tiny_llama_dir)
    ddp, _ = on_each_device(memory, PlanSettings(name, [(8, 8, 8)], strategy="ddp", devices=4))
    assert (ddp.persistent.total(), ddp.peak.total()) == (810 + 160, 860 + 160)
    fsdp, said = on_each_device(
        memory, PlanSettings(name, [(8, 8, 8)], strategy="fsdp2", devices=4)
    )
    assert (fsdp.persistent.total(), fsdp.peak.total()) == (210, 210 + 50 + 2 * 100 + 30)
    assert "divides weights" in said[0]


def test_the_verb_prints_a_table_and_json(tiny_llama_dir, capsys):
    plan(str(tiny_llama_dir / "config.json"), **SMALL)
    table = capsys.readouterr().out
    assert "optimiser moments" in table and "Not counted: the CUDA context" in table
    plan(str(tiny_llama_dir), mask="heads", ratio=0.5, as_json=True, **SMALL)
    found = json.loads(capsys.readouterr().out)
    assert found["peak_bytes"] == sum(found["peak_parts_bytes"].values())
    assert found["settings"]["layout"] == "shared_prefix"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"model": "no-such/model/at-all"}, "llama-3.1-8b"),
        ({"devices": 4, "strategy": "one_device"}, "need strategy ddp or fsdp2"),
        ({"device": "cpu", "precision": "bf16-true"}, "plan 32-true"),
        ({"max_tokens": 9, "layout": "padded"}, "give batch_size"),
        ({"max_tokens": 9}, "a row has 22 tokens"),
        ({"method": "ila", "mask": "rows"}, "no mask"),
        ({"mask": "rows", "adapter": "lora"}, "whole layers"),
        ({"mask": "rows", "ratio": 1.5}, "number in"),
        ({"mask": "rows", "precision": "32-true", "masters": False}, "stochastic_rounding"),
        ({"reference": "swap", "precision": "32-true"}, "swap"),
        ({"mask": "none.safetensors"}, "none.safetensors"),
    ],
)
def test_what_cannot_be_is_said(tiny_llama_dir, words, message):
    with pytest.raises(LitAlignError, match=message):
        plan(**{"model": str(tiny_llama_dir)} | SMALL | words)


def test_bad_configs_are_said(tmp_path):
    path = tmp_path / "config.json"
    for text, message in (("{", "no model configuration"), ("{}", "no model_type")):
        path.write_text(text)
        with pytest.raises(ModelError, match=message):
            read_config(str(path))


def test_rows_need_their_lengths():
    with pytest.raises(TrainingError, match="rows of 3 lengths"):
        PlanSettings("llama-2-7b", [(8, 8)])
