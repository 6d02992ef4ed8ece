"""AdamW on the selected entries of many parameters in one launch, in Triton.

A program reads gradient, moments and master of a block of entries once, and writes the moments, the
master and the weight once. Equation: `reference.py`. Bias corrections come from the step counts on
the device, which are incremented by an operation of their own before the launch, since every
program of a parameter reads them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_align_kernels import launch_tables
from lit_align_kernels.masked_adamw.checks import Noted, lie_alike
from lit_align_kernels.masked_adamw.reference import AdamWEntry
from lit_align_kernels.masked_adamw.rounding import random_bits, round_stochastically
from lit_align_kernels.selected_positions import (
    NUMEL,
    OWN,
    entries_of_program,
    field,
    pointer,
    positions_in_block,
    positions_of_rest,
    rest_of_block,
    weight_pointer,
)

# Words of a bitmap in one step, and half of it for small blocks: the span of a block where every
# sixteenth is selected.
TILE = 512

MASTER = tl.constexpr(OWN.value)
GRAD = tl.constexpr(OWN.value + 1)
EXP_AVG = tl.constexpr(OWN.value + 2)
EXP_AVG_SQ = tl.constexpr(OWN.value + 3)
STEP = tl.constexpr(OWN.value + 4)
SEED = tl.constexpr(OWN.value + 5)
NUMBER = tl.constexpr(OWN.value + 6)  # of the parameter in the batch


@triton.jit
def bias_correction(log_beta, step):
    """1 − βᵗ without cancellation: −(exp(x) − 1) at x = t·ln β, by its series where |x| < 1/2."""
    x = step * log_beta
    series = 1 + x / 8
    series = 1 + x / 7 * series
    series = 1 + x / 6 * series
    series = 1 + x / 5 * series
    series = 1 + x / 4 * series
    series = 1 + x / 3 * series
    series = 1 + x / 2 * series
    return tl.where(x > -0.5, -x * series, 1 - tl.exp(x))


@triton.jit
def aligned_grad(
    address, start, whole, dtype: tl.constexpr, BYTES: tl.constexpr, BLOCK: tl.constexpr
):
    """Gradients of lanes below `whole` where 16 does not divide the gradient's address.

    Read from the multiple of 16 below it, then shifted into place. The few entries read too many
    lie in the same 16 bytes as the first one.
    """
    shift = ((address % 16) // BYTES).to(tl.int32)
    grad = tl.multiple_of((address - address % 16).to(tl.pointer_type(dtype)), 16) + start
    lane, beyond = tl.arange(0, BLOCK), tl.arange(0, 16)
    main = tl.load(grad + lane, mask=lane < whole, other=0.0).to(tl.float32)  # stream
    left = beyond < tl.where(whole > 0, shift, 0)
    rest = tl.load(grad + whole + beyond, mask=left, other=0.0).to(tl.float32)  # stream
    source = lane + shift
    shifted = tl.gather(main, tl.minimum(source, BLOCK - 1), 0)
    last = tl.gather(rest, tl.minimum(tl.maximum(source - whole, 0), 15), 0)
    return tl.where(source < whole, shifted, last)


@triton.jit
def adamw(exp_avg, exp_avg_sq, master, grad, settings):
    """The equation: moments and master after the step."""
    step_size, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, scale2, eps = settings
    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
    root = tl.sqrt(exp_avg_sq) * scale2 + eps
    return exp_avg, exp_avg_sq, master * decay - step_size * (exp_avg / root)


@triton.jit
def as_stored(parameter, master, entry, dtype: tl.constexpr, STOCHASTIC: tl.constexpr):
    """New values of these entries in the master's dtype."""
    if STOCHASTIC:
        bits = random_bits(field(parameter, SEED), field(parameter, NUMBER), entry)
        master = round_stochastically(master, bits, dtype)
    return master.to(dtype)


@triton.jit
def update_block(
    parameter, start, numel, rest, scale, settings,
    KIND: tl.constexpr, INDEX_TYPE: tl.constexpr, EVEN: tl.constexpr, MASTER_TYPE: tl.constexpr,
    WEIGHT_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, GRAD_BYTES: tl.constexpr,
    ALIGNED: tl.constexpr, GRAD_ALIGNED: tl.constexpr, STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Entries of one block up to a multiple of 16, so that masks do not break accesses up."""
    lane = tl.arange(0, BLOCK)
    count = tl.minimum(numel - start, BLOCK).to(tl.int32)
    whole = tl.multiple_of(count // 16 * 16, 16)
    mask = lane < whole
    positions = lane
    if WEIGHT_TYPE is not None:
        positions = positions_in_block(parameter, start, count, KIND, INDEX_TYPE, EVEN, BLOCK, TILE)
        rest = rest_of_block(rest, positions, whole, count, KIND)
    if GRAD_ALIGNED:
        grad_ptr = pointer(parameter, GRAD, True, GRAD_TYPE) + start + lane
        grad = tl.load(grad_ptr, mask=mask, other=0.0).to(tl.float32)  # stream
    else:
        grad = aligned_grad(field(parameter, GRAD), start, whole, GRAD_TYPE, GRAD_BYTES, BLOCK)
    exp_avg_ptr = pointer(parameter, EXP_AVG, ALIGNED, tl.float32) + start + lane
    exp_avg_sq_ptr = pointer(parameter, EXP_AVG_SQ, ALIGNED, tl.float32) + start + lane
    master_ptr = pointer(parameter, MASTER, ALIGNED, MASTER_TYPE) + start + lane
    exp_avg = tl.load(exp_avg_ptr, mask=mask, other=0.0)  # stream
    exp_avg_sq = tl.load(exp_avg_sq_ptr, mask=mask, other=0.0)  # stream
    master = tl.load(master_ptr, mask=mask, other=0.0).to(tl.float32)  # stream
    exp_avg, exp_avg_sq, master = adamw(exp_avg, exp_avg_sq, master, grad * scale, settings)
    new = as_stored(parameter, master, start + lane, MASTER_TYPE, STOCHASTIC)
    tl.store(exp_avg_ptr, exp_avg, mask=mask)  # stream
    tl.store(exp_avg_sq_ptr, exp_avg_sq, mask=mask)  # stream
    tl.store(master_ptr, new, mask=mask)  # stream
    if WEIGHT_TYPE is not None:
        weight = weight_pointer(parameter, KIND, EVEN, WEIGHT_TYPE) + positions
        tl.store(weight, new.to(WEIGHT_TYPE), mask=mask)  # scattered
    return rest


@triton.jit
def update_rest(
    parameter, whole, numel, rest, scale, settings,
    KIND: tl.constexpr, INDEX_TYPE: tl.constexpr, MASTER_TYPE: tl.constexpr,
    WEIGHT_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """The last entries of a parameter, up to 15.

    The moments are the two rows of one tile here: half as many narrow accesses.
    """
    entry = whole + tl.arange(0, 16)
    mask = entry < numel
    moment = tl.arange(0, 2)[:, None]
    address = tl.load(parameter + EXP_AVG + moment)  # table
    moments_ptr = address.to(tl.pointer_type(tl.float32)) + entry[None, :]
    master_ptr = pointer(parameter, MASTER, False, MASTER_TYPE) + entry
    grad_ptr = pointer(parameter, GRAD, False, GRAD_TYPE) + entry
    moments = tl.load(moments_ptr, mask=mask[None, :], other=0.0)  # stream
    master = tl.load(master_ptr, mask=mask, other=0.0).to(tl.float32)  # stream
    grad = tl.load(grad_ptr, mask=mask, other=0.0).to(tl.float32) * scale  # stream
    exp_avg = tl.sum(tl.where(moment == 0, moments, 0.0), 0)
    exp_avg_sq = tl.sum(tl.where(moment == 1, moments, 0.0), 0)
    exp_avg, exp_avg_sq, master = adamw(exp_avg, exp_avg_sq, master, grad, settings)
    moments = tl.where(moment == 0, exp_avg[None, :], exp_avg_sq[None, :])
    new = as_stored(parameter, master, entry, MASTER_TYPE, STOCHASTIC)
    tl.store(moments_ptr, moments, mask=mask[None, :])  # stream
    tl.store(master_ptr, new, mask=mask)  # stream
    if WEIGHT_TYPE is not None:
        at = positions_of_rest(parameter, entry, mask, rest, KIND, INDEX_TYPE)
        weight = weight_pointer(parameter, KIND, False, WEIGHT_TYPE) + at
        tl.store(weight, new.to(WEIGHT_TYPE), mask=mask)  # scattered


@triton.jit
def masked_adamw_kernel(
    table, programs, grad_scale, lr, decay, beta1, one_minus_beta1, log_beta1,
    beta2, one_minus_beta2, log_beta2, eps,
    KIND: tl.constexpr, INDEX_TYPE: tl.constexpr, EVEN: tl.constexpr, MASTER_TYPE: tl.constexpr,
    WEIGHT_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, GRAD_BYTES: tl.constexpr,
    ALIGNED: tl.constexpr, GRAD_ALIGNED: tl.constexpr, STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A few blocks of one parameter's entries, and what of them fills no 16."""
    parameter, start = entries_of_program(table, programs, BLOCK * BLOCKS)
    numel = field(parameter, NUMEL)
    step = tl.load(pointer(parameter, STEP, False, tl.float32))  # table
    step_size = lr / bias_correction(log_beta1, step)
    scale2 = 1 / tl.sqrt(bias_correction(log_beta2, step))
    settings = (
        step_size, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, scale2, eps
    )  # fmt: skip
    scale = 1.0
    if grad_scale is not None:
        scale = tl.load(grad_scale)  # table
    rest = tl.zeros((16,), tl.int64)
    for block in tl.static_range(BLOCKS):
        if start + block * BLOCK < numel:
            rest = update_block(
                parameter, start + block * BLOCK, numel, rest, scale, settings, KIND, INDEX_TYPE,
                EVEN, MASTER_TYPE, WEIGHT_TYPE, GRAD_TYPE, GRAD_BYTES, ALIGNED, GRAD_ALIGNED,
                STOCHASTIC, BLOCK, TILE,
            )  # fmt: skip
    whole = numel // 16 * 16
    if (whole < numel) & (start <= whole) & (whole < start + BLOCK * BLOCKS):
        update_rest(
            parameter, whole, numel, rest, scale, settings, KIND, INDEX_TYPE, MASTER_TYPE,
            WEIGHT_TYPE, GRAD_TYPE, STOCHASTIC,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Variant:
    """What the parameters of one launch have in common: the kernel is compiled for it."""

    kind: str
    index_type: torch.dtype
    even: bool
    master: torch.dtype
    weight: torch.dtype | None
    grad: torch.dtype
    aligned: bool
    grad_aligned: bool
    stochastic: bool

    def constexprs(self, block: int) -> dict[str, Any]:
        """Arguments of `masked_adamw_kernel` that are constants."""
        return {
            "KIND": self.kind,
            "INDEX_TYPE": launch_tables.TRITON_TYPES[self.index_type],
            "EVEN": self.even,
            "MASTER_TYPE": launch_tables.TRITON_TYPES[self.master],
            "WEIGHT_TYPE": launch_tables.TRITON_TYPES[self.weight],
            "GRAD_TYPE": launch_tables.TRITON_TYPES[self.grad],
            "GRAD_BYTES": self.grad.itemsize,
            "ALIGNED": self.aligned,
            "GRAD_ALIGNED": self.grad_aligned,
            "STOCHASTIC": self.stochastic,
            "BLOCK": block,
            "BLOCKS": self.blocks,
            "TILE": TILE if block >= 1024 else TILE // 2,
        }

    @property
    def blocks(self) -> int:
        """Blocks of one program: more where wide accesses are fewer beside the narrow ones."""
        return 2 if self.grad_aligned and self.master == torch.float32 else 4


class Launch:
    """One launch: parameters of one `Variant`, in a table of which gradients and seed change."""

    def __init__(
        self, variant: Variant, rows: list[list[int]], where: list[int], device: torch.device
    ) -> None:
        """Args: their variant, their rows of the table, their places in the batch, their GPU."""
        block = launch_tables.block_entries()
        numels = tuple(row[0] for row in rows)
        self._programs = launch_tables.programs(numels, block * variant.blocks, device)
        self._constants = variant.constexprs(block)
        self._where, self._device = where, device
        self._rows = torch.tensor(rows)
        self._now: tuple[list[int], int] = [], 0
        self._table = torch.empty(0)

    def __call__(self, grads: list[int], seed: int, arguments: tuple[Any, ...]) -> None:
        """Step, with gradients at these addresses (those of the whole batch)."""
        now = ([grads[i] for i in self._where], seed)
        if now != self._now:
            self._rows[:, GRAD.value] = torch.tensor(now[0])
            self._rows[:, SEED.value] = seed
            self._table, self._now = launch_tables.parameter_table(self._rows, self._device), now
        masked_adamw_kernel[(len(self._programs),)](
            *(self._table, self._programs, *arguments),
            **self._constants,
            num_warps=launch_tables.num_warps(),
        )


class Plan:
    """The launches of a batch, for as long as it is made of the same tensors."""

    def __init__(self, batch: list[AdamWEntry], grads: list[Tensor], stochastic: bool) -> None:
        self.steps = [entry.step for entry in batch]
        found: dict[Variant, tuple[list[list[int]], list[int]]] = {}
        for number, (entry, grad) in enumerate(zip(batch, grads, strict=True)):
            if entry.master.numel():
                variant, row = _describe(entry, grad, stochastic, number)
                rows, where = found.setdefault(variant, ([], []))
                rows.append(row)
                where.append(number)
        device = batch[0].master.device
        self.launches = [Launch(variant, *rows, device) for variant, rows in found.items()]


def launch(
    batch: list[AdamWEntry],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
    stochastic_rounding_seed: int | None = None,
    noted: Noted | None = None,
) -> None:
    """See `masked_adamw_`, which checks the entries: all on one device; a launch a `Variant`.

    `noted` holds for this batch: then it keeps the launches.
    """
    if not batch:
        return
    stochastic = stochastic_rounding_seed is not None
    if noted is None:
        grads = [_laid_out_like(entry.grad, entry.master) for entry in batch]
        plan, addresses = Plan(batch, grads, stochastic), [grad.data_ptr() for grad in grads]
    else:
        if noted.plan is None:
            noted.plan = Plan(batch, [entry.grad for entry in batch], stochastic)
        plan, addresses = noted.plan, noted.grad_addresses
    torch._foreach_add_(plan.steps, 1)
    arguments = (
        *(grad_scale, lr, 1 - lr * weight_decay),
        *(beta1, 1 - beta1, math.log(beta1) if beta1 else -math.inf),
        *(beta2, 1 - beta2, math.log(beta2) if beta2 else -math.inf, eps),
    )
    seed = _as_int64(stochastic_rounding_seed or 0)
    with launch_tables.on_device_of(batch[0].master):
        for one in plan.launches:
            one(addresses, seed, arguments)


def _describe(
    entry: AdamWEntry, grad: Tensor, stochastic: bool, number: int
) -> tuple[Variant, list[int]]:
    states = (entry.exp_avg, entry.exp_avg_sq)
    numel = entry.master.numel()
    (kind, index_type, even), columns = launch_tables.place(
        entry.weight, entry.entries, numel, launch_tables.block_entries()
    )
    variant = Variant(
        kind,
        index_type,
        even,
        entry.master.dtype,
        None if entry.weight is None else entry.weight.dtype,
        grad.dtype,
        launch_tables.aligned(entry.master, *states),
        launch_tables.aligned(grad),
        stochastic and entry.master.dtype != torch.float32,
    )
    own = (entry.master, grad, *states, entry.step)
    return variant, [*columns, *(tensor.data_ptr() for tensor in own), 0, number]


def _as_int64(seed: int) -> int:
    """The lowest 64 bits."""
    return ((seed + 2**63) % 2**64) - 2**63


def _laid_out_like(grad: Tensor, master: Tensor) -> Tensor:
    """`grad` in the memory order of `master`: both are read as they lie."""
    if lie_alike(grad, master):
        return grad
    return torch.empty_like(master, dtype=grad.dtype).copy_(grad)
