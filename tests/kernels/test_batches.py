"""What does not fit is refused before anything is read or written; parts of a batch by device."""

import dataclasses

import pytest
import torch

from lit_align_kernels.batches import by_device
from lit_align_kernels.entries import Entries
from lit_align_kernels.masked_adamw import AdamWEntry, masked_adamw_, reference
from lit_align_kernels.swap_selected import gather_selected_, scatter_selected_, swap_selected_
from lit_align_kernels.swap_selected import reference as swap_reference

SETTINGS = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}
ROWS = torch.tensor([1, 3])


def on(device, **changed):
    """Two rows of a (4, 8) weight, in the middle of nothing."""

    def some():
        return torch.ones(16, device=device)

    entries = Entries("rows", (4, 8), rows=ROWS.to(device))
    weight, step = torch.zeros(4, 8, device=device), torch.zeros((), device=device)
    entry = AdamWEntry(some(), some(), some(), some(), step, weight, entries)
    return dataclasses.replace(entry, **changed)


def positions(*, shape=(4, 8), device="cpu", dtype=torch.int64, stride=1):
    found = torch.arange(16 * stride, dtype=dtype, device=device)[::stride]
    return Entries("elements", shape, positions=found)


BAD_WEIGHTS = {
    "weight .* entries": {"entries": positions(shape=(8, 4))},
    "positions .* must be torch.int32 or torch.int64": {"entries": positions(dtype=torch.int16)},
    "positions .* must be contiguous": {"entries": positions(stride=2)},
    "positions .* must be on cpu": {"entries": positions(device="meta")},
    "rows .* must be torch.int64": {"entries": Entries("rows", (4, 8), rows=ROWS.int())},
    "rows .* must be on cpu": {"entries": Entries("rows", (4, 8), rows=ROWS.to("meta"))},
    "weight must be contiguous": {"weight": torch.zeros(8, 4).t()},
    "weight must be torch.float32": {"weight": torch.zeros(4, 8).double()},
}
EIGHT = torch.ones(8)
BAD_ENTRIES = BAD_WEIGHTS | {
    "master must hold 16": dict.fromkeys(("master", "grad", "exp_avg", "exp_avg_sq"), EIGHT),
    "gradient must have the shape": {"grad": torch.ones(15)},
    "gradient must be .* got torch.float64": {"grad": torch.ones(16).double()},
    "gradient must be on cpu": {"grad": torch.ones(16, device="meta")},
    "exp_avg must be torch.float32, got torch.bfloat16": {"exp_avg": torch.ones(16).bfloat16()},
    "exp_avg_sq must have the shape": {"exp_avg_sq": torch.ones(4, 4)},
    "exp_avg_sq must be on cpu": {"exp_avg_sq": torch.ones(16, device="meta")},
    "step must be torch.float32": {"step": torch.zeros((), dtype=torch.int64)},
    "step must have the shape": {"step": torch.zeros(1)},
    "a weight needs its entries": {"entries": None},
    "weight must be on cpu": {
        "weight": torch.zeros(4, 8, device="meta"),
        "entries": positions(device="meta"),
    },
    "master of shape .* has gaps": {"master": torch.ones(32)[::2], "weight": None},
    "moments must lie in memory": {"exp_avg": torch.ones(32)[::2]},
}  # fmt: skip
BAD_VALUES = {
    "values must have the shape": torch.ones(15),
    "values must be contiguous": torch.ones(32)[::2],
    "values must be torch.float32": torch.ones(16).double(),
    "values must be on cpu": torch.ones(16, device="meta"),
}


@pytest.mark.parametrize("message", BAD_ENTRIES)
def test_steps_of_what_does_not_fit(message):
    good, bad = on("cpu"), on("cpu", **BAD_ENTRIES[message])
    with pytest.raises((ValueError, TypeError), match=f"number 1 of the batch: .*{message}"):
        masked_adamw_([good, bad], **SETTINGS)
    assert good.step == 0 and (good.master == 1).all() and (good.weight == 0).all()


def test_a_bitmap_that_stayed_on_another_device():
    entries = positions()
    entries.cache["bitmap"] = entries.bitmap().to("meta")
    with pytest.raises(ValueError, match="bitmap of its entries must be on cpu"):
        masked_adamw_([on("cpu", entries=entries)], **SETTINGS)


def test_a_scale_in_another_dtype():
    with pytest.raises(TypeError, match="grad_scale must be"):
        masked_adamw_([on("cpu")], **SETTINGS, grad_scale=torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("run", [swap_selected_, scatter_selected_, gather_selected_])
@pytest.mark.parametrize("message", [*BAD_WEIGHTS, *BAD_VALUES])
def test_exchanges_of_what_does_not_fit(message, run):
    good, bad = on("cpu"), on("cpu", **BAD_WEIGHTS.get(message, {}))
    values = BAD_VALUES.get(message, torch.ones(16))
    batch = [(good.weight, good.entries, torch.ones(16)), (bad.weight, bad.entries, values)]
    with pytest.raises((ValueError, TypeError), match=f"number 1 of the batch: .*{message}"):
        run(batch)
    assert (good.weight == 0).all()


def test_values_in_another_dtype_are_cast_but_never_exchanged():
    entry, values = on("cpu"), torch.ones(16).bfloat16()
    with pytest.raises(TypeError, match=r"values must be torch.float32, got torch.bfloat16"):
        swap_selected_([(entry.weight, entry.entries, values)])
    scatter_selected_([(entry.weight, entry.entries, values)])
    assert (entry.weight[ROWS] == 1).all()


def test_parts_keep_their_order():
    parts = by_device([3, 1, 2, 4], lambda n: torch.device("meta" if n % 2 else "cpu"))
    assert parts == {torch.device("meta"): [3, 1], torch.device("cpu"): [2, 4]}


def test_a_model_on_two_devices_takes_one_step(monkeypatch):
    seen = []
    monkeypatch.setattr(
        reference, "masked_adamw_", lambda batch, **rest: seen.append((batch, rest))
    )
    batch = [on("cpu"), on("meta"), on("cpu")]
    scale = torch.ones(())
    masked_adamw_(batch, **SETTINGS, grad_scale=scale, stochastic_rounding_seed=5)
    assert [part for part, _ in seen] == [[batch[0], batch[2]], [batch[1]]]
    assert [str(rest["grad_scale"].device) for _, rest in seen] == ["cpu", "meta"]
    assert seen[0][1]["stochastic_rounding_seed"] == 5
    assert seen[1][1]["stochastic_rounding_seed"] not in range(2**40)  # of no later step either


def test_weights_on_two_devices_are_exchanged(monkeypatch):
    seen = []
    monkeypatch.setitem(
        swap_reference.OPERATIONS, "swap", lambda weight, *_: seen.append(str(weight.device))
    )
    batch = [on("cpu"), on("meta"), on("cpu")]
    swap_selected_([(e.weight, e.entries, e.master) for e in batch])
    assert seen == ["cpu", "cpu", "meta"]
