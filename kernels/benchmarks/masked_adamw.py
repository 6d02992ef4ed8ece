"""A step of masked AdamW against a dense step, and against gather, step, scatter.

All of them scale the gradients, as clipping does: ours and the dense one (torch's fused AdamW) in
the step itself. The dense one holds parameters in fp32 alone, as mixed precision trains them, while
ours also writes the weights, which are bf16 on a GPU.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lit_align_kernels.benchmarks.case import OURS, BenchmarkCase, Run, Size, dtype_of
from lit_align_kernels.benchmarks.masks import selections
from lit_align_kernels.entries import Entries
from lit_align_kernels.masked_adamw import AdamWEntry, masked_adamw_
from lit_align_kernels.masked_adamw import reference as torch_path
from lit_align_kernels.swap_selected import gather_entries

# A step that fp32 masters of this size resolve to 4 digits, so that the change can be checked.
SETTINGS: dict[str, Any] = {
    "lr": 1e-3,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-6,
    "weight_decay": 0.1,
}
GRADIENT = 1e-5  # its size: small enough for eps to count
STEP = 10.0
SCALE = 0.5
DENSE = "torch dense"
TOLERANCE = 1e-3  # of changes, rounded to fp32 beside what changes
POOL = (1 << 20) + 16  # random values that inputs repeat: drawing 134M takes longer than the step

# The weights of a model of 134M parameters (30 layers of width 576, tied head), and smaller ones.
LAYER = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
SHAPES: dict[Size, list[tuple[int, int]]] = {
    "tiny": [(64, 48), (48, 64)],
    "small": [(4096, 576), *LAYER],
    "full": [(49152, 576), *LAYER * 30],
}


@dataclasses.dataclass
class Inputs:
    """Weights, and the state of what trains in them.

    Attributes:
        batch: selected entries of every weight.
        dense: (parameters, gradients, exp_avg, exp_avg_sq, steps) of all entries.
        scale: factor on the gradients, ().
    """

    batch: list[AdamWEntry]
    dense: tuple[list[Tensor], ...]
    scale: Tensor


def cases(
    size: Size, device: torch.device, dtype: torch.dtype | None = None
) -> list[BenchmarkCase]:
    """10 % of elements, and 10 % of rows."""
    dtype = dtype or dtype_of(device)
    return [
        _case(name, size, device, dtype, entries)
        for name, entries in selections(SHAPES[size], device).items()
    ]


def _case(
    name: str,
    size: Size,
    device: torch.device,
    dtype: torch.dtype,
    entries: Mapping[tuple[int, ...], Entries],
) -> BenchmarkCase:
    selected = sum(entries[s].numel for s in SHAPES[size])
    mask_bytes = sum(_mask_bytes(entries[s]) for s in SHAPES[size])
    implementations: dict[str, Run] = {OURS: _ours, DENSE: _dense}
    if device.type == "cuda":
        implementations["torch masked"] = _torch
        implementations["torch.compile masked"] = torch.compile(_torch, dynamic=False)
    return BenchmarkCase(
        operation="masked_adamw",
        name=name,
        make=lambda seed: _inputs(size, dtype, entries, device, seed),
        implementations=implementations,
        expected=_expected,
        baseline=DENSE,
        # gradient read; moments and master read and written; weight written; mask read
        minimum_bytes=selected * (4 + 24 + dtype.itemsize) + mask_bytes,
        tolerance=[*[TOLERANCE] * (3 * len(SHAPES[size])), 0.0],
        compared=_changes,
        shapes={"parameters": sum(map(math.prod, SHAPES[size])), "selected": selected},
    )


def _mask_bytes(entries: Entries) -> int:
    if entries.kind == "rows":
        assert entries.rows is not None
        return entries.rows.numel() * 8
    return min(math.prod(entries.shape) // 8, entries.numel * 4)


def _inputs(
    size: Size,
    dtype: torch.dtype,
    entries: Mapping[tuple[int, ...], Entries],
    device: torch.device,
    seed: int,
) -> Inputs:
    generator = torch.Generator(device=device).manual_seed(seed)
    pool = torch.randn(POOL, generator=generator, device=device)
    inputs = Inputs([], ([], [], [], [], []), torch.full((), SCALE, device=device))
    for i, shape in enumerate(SHAPES[size]):
        chosen = entries[shape]
        parameter, gradient, exp_avg, exp_avg_sq = (
            _repeated(pool, shape, 1000 * i + 100_000 * k) for k in range(4)
        )
        gradient *= GRADIENT
        exp_avg *= GRADIENT
        exp_avg_sq = exp_avg_sq.square_().add_(0.1).mul_(GRADIENT**2)
        dense = (parameter, gradient, exp_avg, exp_avg_sq, torch.full((), STEP, device=device))
        for tensors, tensor in zip(inputs.dense, dense, strict=True):
            tensors.append(tensor)
        master, grad, avg, avg_sq = (gather_entries(t, chosen) for t in dense[:4])
        step, weight = dense[4].clone(), parameter.to(dtype)
        inputs.batch.append(AdamWEntry(master, grad, avg, avg_sq, step, weight, chosen))
    return inputs


def _repeated(pool: Tensor, shape: tuple[int, int], shift: int) -> Tensor:
    """`pool`, rotated by `shift`, as often as it takes to fill `shape`."""
    numel = math.prod(shape)
    return pool.roll(shift).repeat(-(-numel // POOL))[:numel].clone().view(shape)


def _results(inputs: Inputs) -> list[Tensor]:
    moved = [t for e in inputs.batch for t in (e.master, e.exp_avg, e.exp_avg_sq)]
    weights = [e.weight for e in inputs.batch if e.weight is not None]
    return moved + weights


def _ours(inputs: Inputs) -> list[Tensor]:
    masked_adamw_(inputs.batch, **SETTINGS, grad_scale=inputs.scale)
    return _results(inputs)


def _torch(inputs: Inputs) -> list[Tensor]:
    torch_path.masked_adamw_(inputs.batch, **SETTINGS, grad_scale=inputs.scale)
    return _results(inputs)


@torch.no_grad()
def _dense(inputs: Inputs) -> list[Tensor]:
    parameters, gradients, exp_avg, exp_avg_sq, steps = inputs.dense
    adamw(
        parameters, gradients, exp_avg, exp_avg_sq, [], steps,
        fused=True, amsgrad=False, maximize=False, **SETTINGS,
        grad_scale=inputs.scale.reciprocal(),  # torch divides by it
    )  # fmt: skip
    return [*parameters, *exp_avg, *exp_avg_sq]


def _expected(inputs: Inputs) -> list[Tensor]:
    """Changes in fp64, the equation written out once more; no weight is another than it should."""
    lr, eps, decay = SETTINGS["lr"], SETTINGS["eps"], SETTINGS["weight_decay"]
    beta1, beta2 = SETTINGS["beta1"], SETTINGS["beta2"]
    changes: list[Tensor] = []
    for entry in inputs.batch:
        grad = entry.grad.double() * SCALE
        old, old_avg, old_sq = (t.double() for t in (entry.master, entry.exp_avg, entry.exp_avg_sq))
        exp_avg, exp_avg_sq = beta1 * old_avg + (1 - beta1) * grad, beta2 * old_sq
        exp_avg_sq += (1 - beta2) * grad**2
        root = (exp_avg_sq / (1 - beta2 ** (STEP + 1))).sqrt() + eps
        change = -lr * (decay * old + exp_avg / (1 - beta1 ** (STEP + 1)) / root)
        changes += [change, exp_avg - old_avg, exp_avg_sq - old_sq]
    return [*changes, torch.zeros(1, device=inputs.scale.device)]


def _changes(name: str, before: Inputs, after: Inputs, _: list[Tensor]) -> list[Tensor]:
    """New minus old of masters and moments; the count of weights that are not the master's cast."""
    if name == DENSE:  # it has no weights beside its parameters
        new, old = _selected(after), _selected(before)
        wrong = torch.zeros(1, device=after.scale.device)
    else:
        new, old = (
            [t for e in i.batch for t in (e.master, e.exp_avg, e.exp_avg_sq)]
            for i in (after, before)
        )
        pairs = zip(before.batch, after.batch, strict=True)
        wrong = torch.stack([_wrong_weights(b, a) for b, a in pairs]).sum(0, keepdim=True)
    return [*(n.double() - o.double() for n, o in zip(new, old, strict=True)), wrong]


def _selected(inputs: Inputs) -> list[Tensor]:
    """Parameters and moments of the dense step at the selected entries."""
    parameters, _, exp_avg, exp_avg_sq, _ = inputs.dense
    state = zip(inputs.batch, parameters, exp_avg, exp_avg_sq, strict=True)
    return [gather_entries(t, e.entries) for e, *tensors in state for t in tensors if e.entries]


def _wrong_weights(before: AdamWEntry, after: AdamWEntry) -> Tensor:
    """How many weights are neither the master's cast nor, where none is selected, the old ones."""
    assert before.weight is not None and after.weight is not None and before.entries is not None
    right = _with_entries(before.weight, before.entries, after.master.to(before.weight.dtype))
    return (after.weight != right).sum()


def _with_entries(weight: Tensor, entries: Entries, values: Tensor) -> Tensor:
    if entries.kind == "rows":
        assert entries.rows is not None
        weight[entries.rows] = values.view(-1, weight.shape[1])
    else:
        assert entries.positions is not None
        weight.view(-1)[entries.positions.long()] = values
    return weight
