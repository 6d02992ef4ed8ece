"""Log-probs of target tokens from hidden states, a block of the vocabulary at a time. Plain torch.

The path without Triton: all tokens share one read of a block of the head, whose gradient is final
when the block is done.

With logits z = f(h Wᵀ + b) (f scales and soft-caps) and target t:

    logp = z_t − logsumexp(z)          d logp / d z = onehot(t) − softmax(z)

The forward joins the blocks' logsumexps; the backward forms each block of logits once more,
except for the first few, which are kept as far as memory was granted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from lit_align_kernels.entries import Entries
from lit_align_kernels.masked_weight_grad import gather_block
from lit_align_kernels.products import add_product, product, write_product


@dataclasses.dataclass(frozen=True)
class HeadSettings:
    """How logits are formed from the head's product.

    Attributes:
        logit_scale: factor on the logits.
        soft_cap: c in c·tanh(z / c) after scaling, or None.
        block: vocabulary entries whose logits, and rows of the weight's gradient, exist at once.
        kept_blocks: blocks whose logits a backward finds kept instead of forming them once more.
    """

    logit_scale: float = 1.0
    soft_cap: float | None = None
    block: int = 4096
    kept_blocks: int = 0


@dataclasses.dataclass
class TokenStatistics:
    """What is worth logging of the distributions behind the log-probs; no gradient.

    Attributes:
        entropy_nats: (N,) fp32.
        is_argmax: (N,) bool, whether the target is the most likely token.
        mean_logit: (N,) fp32, over the vocabulary.
    """

    entropy_nats: Tensor
    is_argmax: Tensor
    mean_logit: Tensor


def _blocks(weight: Tensor, s: HeadSettings) -> Iterator[tuple[int, int]]:
    """(start, stop) of each block of the vocabulary."""
    for start in range(0, weight.shape[0], s.block):
        yield start, min(weight.shape[0], start + s.block)


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, start: int, stop: int, s: HeadSettings
) -> Tensor:
    part = weight[start:stop].to(hidden.dtype)
    logits = product(hidden, part.t()).float()
    if bias is not None:
        logits += bias[start:stop].float()
    if s.logit_scale != 1.0:
        logits *= s.logit_scale
    if s.soft_cap is not None:
        logits = s.soft_cap * torch.tanh(logits / s.soft_cap)
    return logits


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    s: HeadSettings,
    kept: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets and the logsumexp of their logits, each (N,) fp32.

    Args:
        hidden: (N, D).
        weight: (V, D).
        bias: (V,) or None.
        targets: (N,) int64.
        s: how logits are formed.
        kept: where given, the logits of the first `s.kept_blocks` are appended.
    """
    # NaN, not empty: on a GPU targets are not checked, and a stray one must not read old memory.
    target_logit = hidden.new_full((hidden.shape[0],), torch.nan, dtype=torch.float32)
    parts = []
    for start, stop in _blocks(weight, s):
        logits = _logits(hidden, weight, bias, start, stop, s)
        _take_targets(logits, targets, start, stop, target_logit)
        parts.append(logits.logsumexp(1))
        if kept is not None and len(kept) < s.kept_blocks:
            kept.append(logits)
    logsumexp = torch.stack(parts).logsumexp(0)
    return target_logit - logsumexp, logsumexp


def _take_targets(logits: Tensor, targets: Tensor, start: int, stop: int, out: Tensor) -> None:
    inside = ((targets >= start) & (targets < stop)).nonzero()[:, 0]
    out[inside] = logits[inside, targets[inside] - start]


def backward(
    grad: Tensor,
    logsumexp: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    s: HeadSettings,
    entries: Entries | None,
    needs: tuple[bool, bool, bool],
    kept: list[Tensor],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the log-probs, weighted by `grad` (N,).

    Args:
        grad: (N,) fp32, the gradient that arrives at the log-probs.
        logsumexp: (N,) fp32 from `forward`.
        hidden: (N, D).
        weight: (V, D).
        bias: (V,) or None.
        targets: (N,) int64.
        s: how logits are formed.
        entries: selected entries of the weight, or None for a dense gradient.
        needs: whether hidden, weight (or its selected entries) and bias need a gradient.
        kept: logits of the first blocks from `forward`; consumed.

    Returns:
        Gradients of hidden (N, D) in its dtype, of the weight ((V, D) in its dtype, or (M,) fp32 at
        its selected entries), and of the bias (V,); None where not needed.
    """
    needs_hidden, needs_weight, needs_bias = needs
    grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs_hidden else None
    grad_bias = (
        torch.zeros_like(bias, dtype=torch.float32) if needs_bias and bias is not None else None
    )
    grad_weight = None
    if needs_weight:
        size = weight.shape if entries is None else (entries.numel,)
        grad_weight = torch.empty(size, dtype=torch.float32, device=weight.device)
    # In fp32 −grad multiplies (N, D) before and after instead of every block of logits; in half
    # precision that would round once more.
    factor = -grad[:, None]
    late = hidden.dtype == torch.float32
    weighted = hidden * factor if late else hidden
    for start, stop in _blocks(weight, s):
        logits = kept.pop(0) if kept else _logits(hidden, weight, bias, start, stop, s)
        d_logits = _logit_gradient(logits, logsumexp, targets, s, start, stop)
        if grad_bias is not None:
            torch.mv(d_logits.t(), -grad, out=grad_bias[start:stop])
        d_logits = d_logits if late else d_logits.mul_(factor).to(hidden.dtype)
        if grad_hidden is not None:
            add_product(grad_hidden, d_logits, weight[start:stop].to(hidden.dtype))
        if grad_weight is not None:
            _weight_gradient(d_logits, weighted, entries, start, stop, grad_weight)
    return (
        _hidden_gradient(grad_hidden, hidden, factor if late else None),
        grad_weight if entries is not None or grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
    )


def _hidden_gradient(found: Tensor | None, hidden: Tensor, factor: Tensor | None) -> Tensor | None:
    if found is None:
        return None
    return (found if factor is None else found.mul_(factor)).to(hidden.dtype)


def _logit_gradient(
    logits: Tensor, logsumexp: Tensor, targets: Tensor, s: HeadSettings, start: int, stop: int
) -> Tensor:
    """(softmax − onehot)·f′ of one block of the vocabulary, in place: (N, stop - start) fp32."""
    chain = None if s.soft_cap is None else 1.0 - (logits / s.soft_cap).square()
    d_logits = logits.sub_(logsumexp[:, None]).exp_()
    inside = ((targets >= start) & (targets < stop)).nonzero()[:, 0]
    d_logits[inside, targets[inside] - start] -= 1.0
    if chain is not None:
        d_logits *= chain
    return d_logits if s.logit_scale == 1.0 else d_logits.mul_(s.logit_scale)


def _weight_gradient(
    d_logits: Tensor, hidden: Tensor, entries: Entries | None, start: int, stop: int, out: Tensor
) -> None:
    if entries is None:
        write_product(out[start:stop], d_logits.t(), hidden)
    elif entries.kind == "rows" and entries.axis == 0:
        assert entries.rows is not None
        first, last = entries.counts_before([start, stop])
        chosen = d_logits.index_select(1, entries.rows[first:last] - start)
        width = hidden.shape[1]
        out[first * width : last * width] = product(chosen.t(), hidden).reshape(-1)
    elif entries.kind == "rows":  # columns of the weight: an adapter's, beside those of the head
        assert entries.rows is not None
        columns = out.view(entries.rows.numel(), entries.row_length)
        columns[:, start:stop] = product(hidden.index_select(1, entries.rows).t(), d_logits)
    else:
        gather_block(product(d_logits.t(), hidden), entries, start, stop, out)


@torch.no_grad()
def statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logsumexp: Tensor,
    s: HeadSettings,
) -> TokenStatistics:
    """Entropy, argmax hits and mean logit of each target's distribution, in one more pass."""
    expected_logit = torch.zeros_like(logsumexp)
    total, best = torch.zeros_like(logsumexp), torch.full_like(logsumexp, -torch.inf)
    best_id = torch.zeros_like(targets)
    for start, stop in _blocks(weight, s):
        logits = _logits(hidden, weight, bias, start, stop, s)
        total += logits.sum(1)
        block_best, block_id = logits.max(1)
        better = block_best > best
        best = torch.where(better, block_best, best)
        best_id = torch.where(better, block_id + start, best_id)
        expected_logit += (torch.exp(logits - logsumexp[:, None]) * logits).sum(1)
    return TokenStatistics(
        entropy_nats=logsumexp - expected_logit,
        is_argmax=best_id == targets,
        mean_logit=total / weight.shape[0],
    )
