"""Loss and gradients in one pass over the head: a chunk's logits are formed once.

for every chunk of whole groups:
    x = h Wᵀ                                  (n, V), the only logits that exist
    logp, L, dL/dx                            row kernels; dL/dx replaces x
    dL/dh = dL/dx · W,   dL/dW += (dL/dx)ᵀ h
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from lit_align_kernels.token_logprobs import chunks as token_chunks
from lit_align_kernels.token_logprobs import reference as torch_rows
from lit_align_kernels.token_logprobs.chunks import Chunks, Gradients
from lit_align_kernels.weighted_preference_loss import reference

# (log-probs (stop - start,), start, stop) → the sum of the loss over targets [start, stop)
ChunkLoss = Callable[[Tensor, int, int], Tensor]


@dataclasses.dataclass(frozen=True)
class TokenNPO:
    """Token-weighted NPO: Σ_t w_t·[−logσ(−β·(log π_t − log π_ref,t))] (ALLO, arXiv 2406.12606).

    Attributes:
        beta: > 0.
        ref_per_token_logps: (N,) fp32 nats.
        token_weights: (N,) fp32; 0 leaves a token out, be its log-probs −inf.
    """

    beta: float
    ref_per_token_logps: Tensor
    token_weights: Tensor


@dataclasses.dataclass(frozen=True)
class Settings:
    """What stays the same from chunk to chunk.

    Attributes:
        loss: see `weighted_preference_loss`.
        groups: offsets [0, ..., N] of targets that stay together; None: every token is its own.
        logit_scale: factor on the logits.
        soft_cap: c in c·tanh(logits / c), or None.
        ignore_index: target of tokens that do not count.
    """

    loss: TokenNPO | ChunkLoss
    groups: tuple[int, ...] | None
    logit_scale: float
    soft_cap: float | None
    ignore_index: int


def run(
    chunks: Chunks, gradients: Gradients, targets: Tensor, s: Settings
) -> tuple[Tensor, Tensor]:
    """The sum of the loss and the log-probs (N,) of all targets; their gradient in `gradients`."""
    logps = torch.zeros(len(targets), dtype=torch.float32, device=targets.device)
    loss_sum = torch.zeros((), dtype=torch.float32, device=targets.device)
    for start, stop in chunks.bounds() if s.groups is None else unions(s.groups, chunks.rows):
        at = slice(start, stop)
        if stop - start > chunks.rows:
            loss, logps[at] = _two_phases(chunks, gradients, targets, s, start, stop)
        else:
            logits = chunks.logits(start, stop)
            loss, logps[at] = _one_phase(logits, targets[at], s, start, chunks.triton)
            gradients.add(start, stop, logits)
        loss_sum += loss
    return loss_sum, logps


def unions(groups: tuple[int, ...], rows: int) -> list[tuple[int, int]]:
    """Neighbouring groups joined up to `rows` targets; a group that is longer stands alone."""
    found: list[tuple[int, int]] = []
    for start, stop in itertools.pairwise(groups):
        if start == stop:
            continue
        if found and stop - found[-1][0] <= rows:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found


def _one_phase(
    logits: Tensor, targets: Tensor, s: Settings, start: int, triton: bool
) -> tuple[Tensor, Tensor]:
    """Loss and log-probs of a chunk whose logits become their gradient."""
    stop = start + len(targets)
    if isinstance(s.loss, TokenNPO):
        losses, logps = (_npo_kernel() if triton else reference).npo_rows_(
            logits,
            targets,
            s.loss.ref_per_token_logps[start:stop],
            s.loss.token_weights[start:stop],
            s.loss.beta,
            s.logit_scale,
            s.soft_cap,
            s.ignore_index,
        )
        return losses.sum(), logps
    counted = targets != s.ignore_index
    targets = targets.where(counted, 0)
    if not triton:
        loss, logps = reference.loss_rows_(
            logits,
            targets,
            lambda found: loss_and_gradient(s.loss, found, counted, start),
            s.logit_scale,
            s.soft_cap,
        )
        return loss, logps.where(counted, 0.0)
    rows = _rows(triton)
    logps, logsumexp = rows.rows_forward(logits, targets, s.logit_scale, s.soft_cap)
    loss, grad = loss_and_gradient(s.loss, logps, counted, start)
    rows.rows_backward_(logits, targets, logsumexp, grad, s.logit_scale, s.soft_cap)
    return loss, logps.where(counted, 0.0)


def _two_phases(
    chunks: Chunks, gradients: Gradients, targets: Tensor, s: Settings, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """One group beyond the budget: all its log-probs, the loss, and its logits once more."""
    counted = targets[start:stop] != s.ignore_index
    targets = targets.where(targets != s.ignore_index, 0)
    rows = _rows(chunks.triton)
    settings = (s.logit_scale, s.soft_cap)
    logps, logsumexp = token_chunks.forward(chunks, rows, targets, *settings, start, stop)
    loss, grad = loss_and_gradient(s.loss, logps, counted, start)
    token_chunks.backward(chunks, rows, targets, logsumexp, grad, *settings, gradients, start, stop)
    return loss, logps.where(counted, 0.0)


def loss_and_gradient(
    loss: TokenNPO | ChunkLoss, logps: Tensor, counted: Tensor, start: int
) -> tuple[Tensor, Tensor]:
    """The loss of targets [start, start + n) and its gradient by their log-probs (n,) fp32.

    A target that is not counted has log-prob 0 and gradient 0.
    """
    assert not isinstance(loss, TokenNPO)
    with torch.enable_grad():
        leaf = logps.detach().where(counted, 0.0).requires_grad_()
        total = loss(leaf, start, start + len(leaf))
        grad = None
        if total.requires_grad:
            (grad,) = torch.autograd.grad(total, leaf, allow_unused=True)
    grad = torch.zeros_like(leaf) if grad is None else grad
    return total.detach(), grad.detach().where(counted, 0.0)


def _rows(triton: bool) -> ModuleType:
    if not triton:
        return torch_rows
    from lit_align_kernels.token_logprobs import kernel

    return kernel


def _npo_kernel() -> ModuleType:
    from lit_align_kernels.weighted_preference_loss import kernel

    return kernel
