"""A step of masked AdamW against a dense step, and against gather, step, scatter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lit_align_kernels.benchmarks.case import OURS, BenchmarkCase, Run, Size
from lit_align_kernels.benchmarks.masks import random_elements, random_rows
from lit_align_kernels.entries import Entries
from lit_align_kernels.masked_adamw import AdamWEntry, masked_adamw_
from lit_align_kernels.masked_adamw import reference as torch_path
from lit_align_kernels.swap_selected import gather_entries

SETTINGS: dict[str, Any] = {
    "lr": 1e-5,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.01,
}
SHARE = 0.1

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
    """

    batch: list[AdamWEntry]
    dense: tuple[list[Tensor], ...]


def cases(size: Size, device: torch.device) -> list[BenchmarkCase]:
    """10 % of elements, and 10 % of rows."""
    return [
        _case("10 % of elements", size, device, random_elements),
        _case("10 % of rows", size, device, random_rows),
    ]


def _case(
    name: str,
    size: Size,
    device: torch.device,
    select: Callable[[tuple[int, ...], float, torch.device], Entries],
) -> BenchmarkCase:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    entries = {shape: select(shape, SHARE, device) for shape in set(SHAPES[size])}
    selected = sum(entries[s].numel for s in SHAPES[size])
    mask_bytes = sum(_mask_bytes(entries[s]) for s in SHAPES[size])
    implementations: dict[str, Run] = {OURS: _ours, "torch dense": _dense}
    if device.type == "cuda":
        implementations["torch masked"] = _torch
        implementations["torch.compile masked"] = torch.compile(_torch, dynamic=False)
    return BenchmarkCase(
        operation="masked_adamw",
        name=name,
        make=lambda seed: _inputs(size, dtype, entries, device, seed),
        implementations=implementations,
        expected=_expected,
        baseline="torch dense",
        # gradient read; moments and master read and written; weight written; mask read
        minimum_bytes=selected * (4 + 24 + dtype.itemsize) + mask_bytes,
        tolerance=1e-5 if dtype == torch.float32 else 2**-8,
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
    entries: dict[tuple[int, int], Entries],
    device: torch.device,
    seed: int,
) -> Inputs:
    generator = torch.Generator(device=device).manual_seed(seed)
    batch, parameters, gradients = [], [], []
    for shape in SHAPES[size]:
        weight = torch.randn(shape, generator=generator, device=device).to(dtype)
        gradient = torch.randn(shape, generator=generator, device=device) * 1e-3
        master = gather_entries(weight, entries[shape]).float()
        grad = gather_entries(gradient, entries[shape])
        zeros = torch.zeros_like(master)
        step = torch.zeros((), device=device)
        batch.append(AdamWEntry(master, grad, zeros, zeros.clone(), step, weight, entries[shape]))
        parameters.append(weight.float())
        gradients.append(gradient)
    exp_avg = [torch.zeros_like(p) for p in parameters]
    exp_avg_sq = [torch.zeros_like(p) for p in parameters]
    steps = [torch.zeros((), device=device) for _ in parameters]
    return Inputs(batch, (parameters, gradients, exp_avg, exp_avg_sq, steps))


def _results(inputs: Inputs) -> list[Tensor]:
    moved = [t for e in inputs.batch for t in (e.master, e.exp_avg, e.exp_avg_sq)]
    weights = [e.weight for e in inputs.batch if e.weight is not None]
    return moved + weights


def _ours(inputs: Inputs) -> list[Tensor]:
    masked_adamw_(inputs.batch, **SETTINGS)
    return _results(inputs)


def _torch(inputs: Inputs) -> list[Tensor]:
    torch_path.masked_adamw_(inputs.batch, **SETTINGS)
    return _results(inputs)


@torch.no_grad()
def _dense(inputs: Inputs) -> list[Tensor]:
    parameters, gradients, exp_avg, exp_avg_sq, steps = inputs.dense
    adamw(
        parameters, gradients, exp_avg, exp_avg_sq, [], steps,
        fused=True, amsgrad=False, maximize=False, **SETTINGS,
    )  # fmt: skip
    return [*parameters, *exp_avg, *exp_avg_sq]


def _expected(inputs: Inputs) -> list[Tensor]:
    """The equation in fp64, written out once more."""
    lr, eps, decay = SETTINGS["lr"], SETTINGS["eps"], SETTINGS["weight_decay"]
    beta1, beta2 = SETTINGS["beta1"], SETTINGS["beta2"]
    moved: list[Tensor] = []
    weights: list[Tensor] = []
    for entry in inputs.batch:
        grad = entry.grad.double()
        exp_avg, exp_avg_sq = (1 - beta1) * grad, (1 - beta2) * grad**2
        step = (exp_avg / (1 - beta1)) / ((exp_avg_sq / (1 - beta2)).sqrt() + eps)
        master = entry.master.double() * (1 - lr * decay) - lr * step
        assert entry.weight is not None and entry.entries is not None
        weights.append(_with_entries(entry.weight.double(), entry.entries, master))
        moved += [master, exp_avg, exp_avg_sq]
    return moved + weights


def _with_entries(weight: Tensor, entries: Entries, values: Tensor) -> Tensor:
    if entries.kind == "rows":
        assert entries.rows is not None
        weight[entries.rows] = values.view(-1, weight.shape[1])
    else:
        assert entries.positions is not None
        weight.view(-1)[entries.positions.long()] = values
    return weight
