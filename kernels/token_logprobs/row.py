"""One row of logits in Triton: read once for its softmax, or overwritten by its gradient.

Every lane keeps a running maximum and sum of its own, merged at the end: no reduction across lanes
within the loop, and the same order of additions every time.

A row may start anywhere, so it is cut at absolute multiples of 16 elements of the storage: the
columns between the cuts move in 16-byte accesses whatever V and the row stride are. The at most
15 + 15 columns outside them are one narrow block (`EDGES`), left out where V and the stride divide
by 16. (Only a view whose first address is no multiple of 16 bytes gets narrow accesses.)
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.0e38)  # below every logit but -inf; -inf - LOWEST is -inf, not NaN


@triton.jit
def cut_row(row, stride, V):
    """Cut a row at multiples of 16: its (start, head, n), n columns from column `head` aligned."""
    start = row.to(tl.int64) * stride
    head = ((start + 15) // 16 * 16 - start).to(tl.int32)
    return start, head, tl.maximum(V - head, 0) // 16 * 16


@triton.jit
def aligned(start):
    """The first multiple of 16 from `start` on, in a form in which the compiler sees that it is."""
    return (start + 15) // 16 * 16


@triton.jit
def edge_columns(head, n, V):
    """Columns left and right of the aligned ones, and which of these 32 exist."""
    lane = tl.arange(0, 32)
    columns = tl.where(lane < 16, lane, head + n + lane - 16)
    return columns, (columns < V) & ((lane < head) | (lane >= 16))


@triton.jit
def block_columns(UNROLL: tl.constexpr, LANES: tl.constexpr):
    """(UNROLL, LANES) columns of a block: the UNROLL elements of a lane belong to one thread."""
    return tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def logit_and_slope(x, logit_scale, soft_cap, CAPPED: tl.constexpr):
    """The logit of a raw head product (fp32), and its derivative by the product."""
    slope = logit_scale
    z = x * logit_scale
    if CAPPED:
        # tanh by one exponential: 1 - 2 / (1 + e^2u) saturates to -1 and 1 without overflow.
        t = 1.0 - 2.0 / (1.0 + tl.exp(z * (2.0 / soft_cap)))
        z = soft_cap * t
        slope = logit_scale * (1.0 - t * t)
    return z, slope


@triton.jit
def logits_at(places, exists, logit_scale, soft_cap, CAPPED: tl.constexpr):
    """Logits from the raw head products at `places`, -inf where there is none; None is all."""
    if exists is None:
        x = tl.load(places).to(tl.float32)  # stream
        z, _ = logit_and_slope(x, logit_scale, soft_cap, CAPPED)
    else:
        x = tl.load(places, mask=exists, other=0.0).to(tl.float32)  # stream
        z, _ = logit_and_slope(x, logit_scale, soft_cap, CAPPED)
        z = tl.where(exists, z, -float("inf"))
    return z


@triton.jit
def load_target(targets_ptr, row, V):
    """(target, whether it lies in the vocabulary); -1 where it does not."""
    target = tl.load(targets_ptr + row)  # table
    valid = (target >= 0) & (target < V)
    return tl.where(valid, target, -1).to(tl.int32), valid


@triton.jit
def target_logit(
    logits_ptr, row, stride, target, valid, logit_scale, soft_cap, CAPPED: tl.constexpr
):
    """The target's logit, NaN where it is outside the vocabulary."""
    place = logits_ptr + row.to(tl.int64) * stride + target
    x = tl.load(place, mask=valid, other=0.0).to(tl.float32)  # scattered
    z, _ = logit_and_slope(x, logit_scale, soft_cap, CAPPED)
    return tl.where(valid, z, float("nan"))


@triton.jit
def online(highest, total, z):
    """Add a (UNROLL, LANES) block of logits to every lane's maximum and sum."""
    peaks = tl.maximum(highest, tl.max(z, 0))
    total = total * tl.exp(highest - peaks) + tl.sum(tl.exp(z - peaks[None, :]), 0)
    return peaks, total


@triton.jit
def softmax_sum(
    logits_ptr, row, stride, V, logit_scale, soft_cap,
    CAPPED: tl.constexpr, EDGES: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The highest of a row's first V logits and the sum of exp(logit - highest)."""
    start, head, n = cut_row(row, stride, V)
    places = logits_ptr + aligned(start) + block_columns(UNROLL, LANES)
    highest = tl.full((LANES,), LOWEST, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    full = n // (UNROLL * LANES) * (UNROLL * LANES)
    for begin in range(0, full, UNROLL * LANES):
        z = logits_at(places + begin, None, logit_scale, soft_cap, CAPPED)
        highest, total = online(highest, total, z)
    if full < n:
        exists = block_columns(UNROLL, LANES) < n - full
        z_last = logits_at(places + full, exists, logit_scale, soft_cap, CAPPED)
        highest, total = online(highest, total, z_last)
    peak = tl.max(highest, 0)
    rest = 0.0
    if EDGES:
        edge, is_edge = edge_columns(head, n, V)
        z_edge = logits_at(logits_ptr + start + edge, is_edge, logit_scale, soft_cap, CAPPED)
        peak = tl.maximum(peak, tl.max(z_edge, 0))
        rest = tl.sum(tl.exp(z_edge - peak), 0)
    return peak, tl.sum(total * tl.exp(highest - peak), 0) + rest


@triton.jit
def gradient(x, hit, logsumexp, grad, logit_scale, soft_cap, CAPPED: tl.constexpr):
    """The gradient: grad · (onehot - softmax) · d logit / d raw head product."""
    z, slope = logit_and_slope(x, logit_scale, soft_cap, CAPPED)
    return grad * slope * (tl.where(hit, 1.0, 0.0) - tl.exp(z - logsumexp))


@triton.jit
def replace(
    places, exists, read, hit, logsumexp, grad, logit_scale, soft_cap, CAPPED: tl.constexpr
):
    """Put the gradient over the raw head products that exist; 0 is taken for those not read."""
    x = tl.load(places, mask=read, other=0.0).to(tl.float32)  # stream
    d = gradient(x, hit, logsumexp, grad, logit_scale, soft_cap, CAPPED)
    if exists is None:
        tl.store(places, d.to(places.dtype.element_ty))  # stream
    else:
        tl.store(places, d.to(places.dtype.element_ty), mask=exists)  # stream


@triton.jit
def write_gradient(
    logits_ptr, row, stride, V, target, logsumexp, grad, logit_scale, soft_cap,
    CAPPED: tl.constexpr, EDGES: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write the gradient over a row's logits; where grad is 0 it is 0, and the row is not read.

    From the end to the start: where the row has just been read, its end is still in cache.
    """
    start, head, n = cut_row(row, stride, V)
    columns = block_columns(UNROLL, LANES)
    places = logits_ptr + aligned(start) + columns
    read_columns = tl.where(grad == 0.0, 0, V // 16 * 16 + 16)  # for the compiler a multiple
    logsumexp = tl.where(grad == 0.0, 0.0, logsumexp)  # 0 · exp(0 - logsumexp) must be no NaN
    if EDGES:
        edge, is_edge = edge_columns(head, n, V)
        replace(
            logits_ptr + start + edge, is_edge, is_edge & (edge < read_columns), edge == target,
            logsumexp, grad, logit_scale, soft_cap, CAPPED,
        )  # fmt: skip
    full = n // (UNROLL * LANES) * (UNROLL * LANES)
    if full < n:
        replace(
            places + full, columns < n - full, columns < tl.minimum(read_columns, n - full),
            columns == target - (head + full), logsumexp, grad, logit_scale, soft_cap, CAPPED,
        )  # fmt: skip
    for done in range(0, full, UNROLL * LANES):
        begin = full - UNROLL * LANES - done
        replace(
            places + begin, None, columns < read_columns, columns == target - (head + begin),
            logsumexp, grad, logit_scale, soft_cap, CAPPED,
        )  # fmt: skip
