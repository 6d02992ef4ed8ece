"""The step on fake tensors takes what the real one does: same code, storages counted alike."""

import numpy as np
import pytest
import torch

from lit_align.compact.adapter_settings import AdapterSettings
from lit_align.masks import ParameterMask
from lit_align.masks.granularity import Selection
from lit_align.planning.masks import evenly, planned_mask, selections
from lit_align.planning.model_configs import read_config, weightless_model
from lit_align.planning.modules import made_up_batch
from lit_align.planning.settings import PlanSettings
from lit_align.planning.step import parts_of_calls, run_steps, step_memory
from lit_align.planning.tracker import MemoryTracker

PAIRS = ((40, 30, 20), (35, 10, 25))
SEQUENCES = ((40, 30), (35, 25))


def real_mask(settings: PlanSettings) -> ParameterMask | None:
    """What the plan supposes, with values."""
    if settings.mask == "none":
        return None
    model = weightless_model(read_config(settings.model), torch.float32)
    if settings.mask != "elements":
        return ParameterMask(selections(model, settings.mask, settings.ratio))
    counts = planned_mask(model, "elements", settings.ratio).selections
    return ParameterMask(
        {
            n: Selection.of_positions(p.shape, torch.from_numpy(evenly(p.numel(), counts[n].count)))
            for n, p in model.named_parameters()
        }
    )


def real_step(settings: PlanSettings):
    """The same two steps with values, every token another one where the vocabulary allows."""
    batch = made_up_batch(settings)
    ids = np.random.default_rng(0).permutation(batch.input_ids.numel()) % 380
    batch.input_ids = torch.from_numpy(ids).view(batch.input_ids.shape)
    with MemoryTracker() as tracker, parts_of_calls(tracker):
        tracker.tag((v for v in vars(batch).values() if isinstance(v, torch.Tensor)), "batch")
        return run_steps(settings, real_mask(settings), batch, tracker)


@pytest.mark.parametrize(
    "case",
    [
        {"mask": "elements", "reference": "swap"},
        {"mask": "rows", "layout": "shared_prefix", "gradient_checkpointing": True},
        pytest.param({"mask": "none"}, marks=pytest.mark.long),
        pytest.param({"mask": "rows"}, marks=pytest.mark.long),
        pytest.param(
            {"mask": "heads", "method": "npo", "lengths": SEQUENCES}, marks=pytest.mark.long
        ),
        pytest.param(
            {"mask": "layers", "ratio": 0.3, "method": "sft", "lengths": SEQUENCES},
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"adapter": AdapterSettings(rank=4), "layout": "shared_prefix"}, marks=pytest.mark.long
        ),
    ],
    ids=lambda case: "-".join(str(v) for v in case.values() if isinstance(v, str)),
)
def test_fake_tensors_take_what_real_ones_do(tiny_llama_dir, case):
    plain = {"lengths": PAIRS, "layout": "padded", "device": "cpu", "precision": "32-true"}
    settings = PlanSettings(str(tiny_llama_dir), **plain | case)
    planned, real = step_memory(settings), real_step(settings)
    assert planned.trained == real.trained and planned.parameters == real.parameters
    for part in ("weights", "selected entries", "optimiser moments", "gradients", "base values"):
        assert planned.persistent[part] == real.persistent[part]
    assert planned.persistent.total() == pytest.approx(real.persistent.total(), rel=0.01)
    assert planned.peak.total() == pytest.approx(real.peak.total(), rel=0.01)
