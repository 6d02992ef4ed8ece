"""Chunks of tokens with their whole rows of logits: form them, and sum gradients over them.

What the row kernels work on. In Triton the logits have the hidden states' dtype; in torch fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from lit_align_kernels.entries import Entries
from lit_align_kernels.masked_weight_grad import masked_weight_grad
from lit_align_kernels.products import (
    add_product,
    write_by_eights,
    write_product,
    write_sum_by_eights,
)
from lit_align_kernels.token_logprobs.head import WeightHandle

# Vocabulary entries in one product on a CPU: small temporaries, and yet few waits for threads.
CPU_BLOCK = 4096
# On a GPU every chunk adds to a dense weight's gradient in fp32, which is read and written again:
# of a head of 151,665 × 4096, 4,096 tokens in five chunks (256 MiB) take 13 ms for it on an H100.
CPU_LOGITS_BYTES, GPU_LOGITS_BYTES = 32 << 20, 512 << 20


def default_logits_bytes(device: torch.device) -> int:
    """Logits that may exist at once; on a GPU a product of few rows would leave it idle."""
    return CPU_LOGITS_BYTES if device.type == "cpu" else GPU_LOGITS_BYTES


@functools.lru_cache(maxsize=8)
def _whole(shape: tuple[int, ...], _: torch.device) -> Entries:
    """All entries of a head, kept with the tables that kernels derive from them on a device."""
    return Entries("all", shape)


class Chunks:
    """Logits of chunks of tokens, one chunk at a time in one buffer.

    Attributes:
        rows: the most tokens whose logits exist at once (at least one).
    """

    def __init__(
        self, hidden: Tensor, handle: WeightHandle, max_logits_bytes: int, triton: bool
    ) -> None:
        """Nothing is computed yet.

        Args:
            hidden: (N, D); its dtype is that of the products.
            handle: the head; a weight of another dtype is cast once.
            max_logits_bytes: bounds `rows`.
            triton: whether Triton kernels read the logits.
        """
        self.hidden, self.handle = hidden, handle
        self.weight = handle.weight.to(hidden.dtype)
        self.bias = handle.bias
        self.triton = triton
        bytes_each = hidden.element_size()
        if not triton and hidden.dtype != torch.float32:
            bytes_each += 4  # the product, and its copy in fp32
        columns = self.weight.shape[0]
        if triton:
            from lit_align_kernels.token_logprobs.kernel import padded_vocabulary

            columns = padded_vocabulary(columns, hidden.dtype)
        fitting = max_logits_bytes // (bytes_each * max(1, columns))
        self.rows = min(max(1, fitting), max(1, len(hidden)))
        self._buffer: Tensor | None = None

    def bounds(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        """(start, stop) of chunks that cover [start, stop): of equal size, but for the last."""
        stop = len(self.hidden) if stop is None else stop
        count = -(-(stop - start) // self.rows)
        step = -(-(stop - start) // max(1, count))
        for first in range(start, stop, max(1, step)):
            yield first, min(first + step, stop)

    def logits(self, start: int, stop: int) -> Tensor:
        """The head's product for tokens [start, stop), bias included; valid until the next call."""
        hidden = self.hidden[start:stop]
        if self.triton:
            logits = self._rows_of_buffer(stop - start)
            write_by_eights(logits, hidden, self.weight.t())
        elif hidden.dtype == torch.float32:
            logits = self._fp32_logits(hidden, self._rows_of_buffer(stop - start))
        else:
            logits = torch.mm(hidden, self.weight.t()).float()
        return logits if self.bias is None else logits.add_(self.bias)

    def _rows_of_buffer(self, rows: int) -> Tensor:
        if self._buffer is None or len(self._buffer) < rows:
            self._buffer = None  # the old one goes before the new one comes
            shape = (rows, self.weight.shape[0])
            if self.triton:
                from lit_align_kernels.token_logprobs.kernel import padded_logits

                self._buffer = padded_logits(*shape, self.hidden.dtype, self.hidden.device)
            else:
                self._buffer = self.hidden.new_empty(shape)
        return self._buffer[:rows]

    def _fp32_logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        block = CPU_BLOCK if hidden.device.type == "cpu" else self.weight.shape[0]
        for part, weight in zip(out.split(block, 1), self.weight.split(block), strict=True):
            write_product(part, hidden, weight.t())
        return out


class Gradients:
    """Sums over chunks of the gradients of hidden states, weight (or selected entries) and bias.

    Attributes:
        hidden: (N, D) in its dtype, or None where not needed; complete after the last chunk.
    """

    def __init__(self, chunks: Chunks, needs: tuple[bool, bool, bool]) -> None:
        """Args: the chunks, and whether hidden, weight (or its entries) and bias need one."""
        self._chunks, handle = chunks, chunks.handle
        self._entries = handle.entries or _whole(tuple(handle.weight.shape), handle.weight.device)
        self._seen = False
        self.hidden = torch.empty_like(chunks.hidden) if needs[0] else None
        fp32 = torch.empty(0, dtype=torch.float32, device=chunks.hidden.device)
        self._weight = fp32.new_empty(self._entries.numel) if needs[1] else None
        self._bias = fp32.new_zeros(handle.weight.shape[0]) if needs[2] else None

    def add(self, start: int, stop: int, d_logits: Tensor) -> None:
        """Add tokens [start, stop), whose logits have the gradient `d_logits` (n, V)."""
        chunks = self._chunks
        if self._bias is not None:
            self._bias += d_logits.sum(0, dtype=torch.float32)
        d_logits = d_logits.to(chunks.hidden.dtype)
        if self.hidden is not None:
            write = write_sum_by_eights if chunks.triton else write_product
            write(self.hidden[start:stop], d_logits, chunks.weight)
        if self._weight is not None:
            self._add_weight(self._weight, d_logits, chunks.hidden[start:stop])
        self._seen = True

    def _add_weight(self, out: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
        if self._entries.kind != "all" or hidden.device.type != "cpu":
            masked_weight_grad(d_logits, hidden, self._entries, out=out, accumulate=self._seen)
            return
        parts = out.view(self._chunks.weight.shape).split(CPU_BLOCK)
        for part, d in zip(parts, d_logits.split(CPU_BLOCK, 1), strict=True):
            (add_product if self._seen else write_product)(part, d.t(), hidden)

    @property
    def weight(self) -> Tensor | None:
        """(M,) fp32 at the selected entries, or (V, D) in the weight's dtype."""
        if self._weight is None:
            return None
        found = self._weight if self._seen else self._weight.zero_()
        handle = self._chunks.handle
        if handle.selected is not None:
            return found
        return found.view(handle.weight.shape).to(handle.weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        """(V,) in the bias's dtype."""
        bias = self._chunks.bias
        return None if self._bias is None or bias is None else self._bias.to(bias.dtype)


def forward(
    chunks: Chunks,
    rows: ModuleType,
    targets: Tensor,
    logit_scale: float,
    soft_cap: float | None,
    start: int = 0,
    stop: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of targets [start, stop) and the logsumexp of their logits, each (n,) fp32.

    Args:
        chunks: hidden states and head.
        rows: the module with `rows_forward` (Triton's or torch's).
        targets: (N,) int64, all of them.
        logit_scale: factor on the logits.
        soft_cap: c in c·tanh(logits / c), or None.
        start: first target.
        stop: one past the last, None for all.
    """
    parts = [
        rows.rows_forward(chunks.logits(a, b), targets[a:b], logit_scale, soft_cap)
        for a, b in chunks.bounds(start, stop)
    ]
    none = torch.empty(0, dtype=torch.float32, device=targets.device)
    logps, logsumexp = zip(*parts, strict=True) if parts else ((none,), (none,))
    return torch.cat(logps), torch.cat(logsumexp)


def backward(
    chunks: Chunks,
    rows: ModuleType,
    targets: Tensor,
    logsumexp: Tensor,
    grad: Tensor,
    logit_scale: float,
    soft_cap: float | None,
    gradients: Gradients,
    start: int = 0,
    stop: int | None = None,
) -> None:
    """Add to `gradients` those of log-probs of [start, stop) that have the gradient `grad`.

    The logits are formed once more. `logsumexp` and `grad` are (n,) fp32; the other arguments are
    those of `forward`.
    """
    for a, b in chunks.bounds(start, stop):
        logits, at = chunks.logits(a, b), slice(a - start, b - start)
        rows.rows_backward_(logits, targets[a:b], logsumexp[at], grad[at], logit_scale, soft_cap)
        gradients.add(a, b, logits)
