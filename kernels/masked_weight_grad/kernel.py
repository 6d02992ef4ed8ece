"""`aᵀ b` on tensor cores, of which only the selected entries are stored. Triton.

A program owns one tile of the product, and the grid is the list of tiles that hold a selected
entry. Whatever the mask, both factors are read 16 bytes at a time: rows that come in aligned runs
(heads, blocks of rows) are gathered as they lie, other rows are packed into a narrower `a` first,
and so is a factor whose rows do not start at multiples of 16 bytes.

Whole weights and whole rows are plain products of (packed) factors, and on NVIDIA's GPUs cuBLAS
does those, with sums in fp32: 8,192 tokens of a 4096² weight take it 0.35 ms on an H100, and the
kernel, which visits every tile of scattered elements, 0.45.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_align_kernels.entries import Entries
from lit_align_kernels.masked_weight_grad.tiles import (
    RUN,
    TILINGS,
    Arithmetic,
    Tiling,
    packed_rows,
    plan,
)
from lit_align_kernels.products import fp32_product_by_eights

# Row strides and lengths reach the kernel in units of 8 elements (16 bytes of bf16 and fp16), so
# that the compiler sees that rows begin at multiples of 16 bytes.
UNIT = tl.constexpr(8)
WORD = tl.constexpr(32)  # entries in a word of the bitmap
MOST_COPIED_BYTES = 64 << 20


@triton.jit
def _ones(word):
    """How many bits of a uint32 are set; compiled into the machine's own instruction."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _tile_words(
    bitmap_ptr, bitmap_words, row, column, P, Q, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WHOLE_WORDS: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLUMNS / 32) uint32: the tile's bits of the row-major bitmap, shifted into place."""
    rows = row + tl.arange(0, ROWS)
    within = tl.arange(0, COLUMNS // WORD)
    first = rows.to(tl.int64) * Q + column
    at = (first >> 5)[:, None] + within[None, :]
    inside = (rows < P)[:, None]
    words = tl.load(bitmap_ptr + at, mask=inside & (at < bitmap_words), other=0)  # table
    words = words.to(tl.uint32, bitcast=True)
    if not WHOLE_WORDS:
        at += 1
        after = tl.load(bitmap_ptr + at, mask=inside & (at < bitmap_words), other=0)  # table
        after = after.to(tl.uint32, bitcast=True)
        shift = (first & 31).to(tl.uint32)[:, None]
        words = (words >> shift) | ((after << 1) << (31 - shift))
    left = tl.minimum(tl.maximum(Q - column - within * WORD, 0), WORD)  # columns before the edge
    edge = ((tl.full(left.shape, 1, tl.int64) << left) - 1).to(tl.uint32)
    return words & edge[None, :]


@triton.jit
def _element_places(words, starts, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which entries of a tile are selected, their places in the compact order, and the next."""
    ones = _ones(words)
    before = starts[:, None] + (tl.cumsum(ones, 1) - ones)
    bit = tl.arange(0, WORD).to(tl.uint32)[None, None, :]
    below = words[:, :, None] & ((tl.full((1, 1, WORD), 1, tl.uint32) << bit) - 1)
    places = tl.reshape(before[:, :, None] + _ones(below), (ROWS, COLUMNS))
    stored = tl.reshape((words[:, :, None] >> bit) & 1, (ROWS, COLUMNS)) != 0
    return stored, places, starts + tl.sum(ones, 1)


@triton.jit
def _store(
    product, starts, out_ptr, bitmap_ptr, bitmap_words, row, column, P, Q,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ELEMENTS: tl.constexpr, WHOLE_WORDS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Store what is selected of a tile; returns where the rows of the tile on its right start."""
    if ELEMENTS:
        words = _tile_words(bitmap_ptr, bitmap_words, row, column, P, Q, ROWS, COLUMNS, WHOLE_WORDS)
        stored, places, starts = _element_places(words, starts, ROWS, COLUMNS)
        out_ptrs = out_ptr + places
        if ACCUMULATE:
            product += tl.load(out_ptrs, mask=stored, other=0.0)  # scattered
        tl.store(out_ptrs, product, mask=stored)  # scattered
    else:
        rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * Q + columns[None, :]
        stored = (rows < P)[:, None] & (columns < Q)[None, :]
        if ACCUMULATE:
            product += tl.load(out_ptrs, mask=stored, other=0.0)  # stream
        tl.store(out_ptrs, product, mask=stored)  # stream
    return starts


# One compiled kernel for all numbers of tokens and all strides: only Q decides about widths.
GENERAL = ["N", "P", "a_stride", "b_stride", "a_length", "b_length", "bitmap_words"]


@triton.jit(do_not_specialize=GENERAL)
def masked_product_kernel(
    a_ptr, b_ptr, out_ptr, tiles_ptr, runs_ptr, starts_ptr, bitmap_ptr,
    N, P, Q, a_stride, b_stride, a_length, b_length, bitmap_words,
    RUNS: tl.constexpr, ELEMENTS: tl.constexpr, WHOLE_WORDS: tl.constexpr,
    ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One tile. P rows of the weight (or selected ones) and Q columns, N tokens."""
    tile = tl.program_id(0)
    row = tl.load(tiles_ptr + 2 * tile) * ROWS  # table
    column = tl.load(tiles_ptr + 2 * tile + 1) * COLUMNS  # table
    rows = row + tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    if RUNS:  # the table is as long as whole tiles
        a_columns = tl.load(runs_ptr + rows)  # table
        a_columns = tl.max_contiguous(tl.multiple_of(a_columns, RUNS), RUNS)
    else:
        a_columns = rows
    a_inside = (a_columns < a_length * UNIT)[:, None]
    b_inside = (columns < b_length * UNIT)[None, :]
    tokens = tl.arange(0, TOKENS)
    a_ptrs = a_ptr + a_columns[:, None] + tokens[None, :] * (a_stride * UNIT)
    b_ptrs = b_ptr + tokens[:, None] * (b_stride * UNIT) + columns[None, :]
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, N, TOKENS):
        left = tokens < N - first
        a = tl.load(a_ptrs, mask=a_inside & left[None, :], other=0.0)  # stream
        b = tl.load(b_ptrs, mask=b_inside & left[:, None], other=0.0)  # stream
        product = tl.dot(a, b, product, input_precision=PRECISION)
        a_ptrs += TOKENS * UNIT * a_stride
        b_ptrs += TOKENS * UNIT * b_stride
    starts = row + tl.arange(0, ROWS)
    if ELEMENTS:
        starts = tl.load(starts_ptr + tile.to(tl.int64) * ROWS + tl.arange(0, ROWS))  # table
    if COLUMNS == 128:  # half by half: the addresses of the whole tile do not fit the registers
        halves = tl.permute(tl.reshape(product, (ROWS, 2, COLUMNS // 2)), (0, 2, 1))
        product, right = tl.split(halves)
        starts = _store(
            product, starts, out_ptr, bitmap_ptr, bitmap_words, row, column, P, Q,
            ROWS, COLUMNS // 2, ELEMENTS, WHOLE_WORDS, ACCUMULATE,
        )  # fmt: skip
        _store(
            right, starts, out_ptr, bitmap_ptr, bitmap_words, row, column + COLUMNS // 2, P, Q,
            ROWS, COLUMNS // 2, ELEMENTS, WHOLE_WORDS, ACCUMULATE,
        )  # fmt: skip
    else:
        _store(
            product, starts, out_ptr, bitmap_ptr, bitmap_words, row, column, P, Q,
            ROWS, COLUMNS, ELEMENTS, WHOLE_WORDS, ACCUMULATE,
        )  # fmt: skip


def masked_weight_grad(
    a: Tensor,
    b: Tensor,
    entries: Entries,
    out: Tensor,
    accumulate: bool,
    tilings: tuple[Tiling, ...] | None = None,
) -> None:
    """Write the selected entries of `aᵀ b` to `out`, or add them; see the package's function.

    `tilings` are those to choose from, where it is not the device's own.
    """
    if not entries.numel:
        return
    if entries.kind == "rows" and entries.axis == 1:  # the columns of W are the rows of Wᵀ
        a, b = b, a
    if tilings is None and entries.kind != "elements" and _cublas_is_here(a):
        if entries.kind == "rows":
            a = a.index_select(1, packed_rows(entries))
        _by_cublas(a, b, out.view(-1, b.shape[1]), accumulate)
        return
    work = arithmetic(a.dtype)
    tilings = tilings or TILINGS[target_of(a.device)][work]
    p = plan(entries, tilings, _processors(a.device), a.device)
    rows = a.shape[1]
    if entries.kind == "rows":
        assert entries.rows is not None
        rows = entries.rows.numel()
    if p.packed is not None:
        a = a.index_select(1, p.packed)
    (a, a_length), (b, b_length) = _aligned(a), _aligned(b)
    bitmap = entries.bitmap() if p.starts is not None else None
    with _on(a.device):
        masked_product_kernel[(len(p.tiles),)](
            a,
            b,
            out,
            p.tiles,
            p.tiles if p.runs is None else p.runs,
            p.tiles if p.starts is None else p.starts,
            p.tiles if bitmap is None else bitmap,
            a.shape[0],
            rows,
            b.shape[1],
            a.stride(0) // UNIT.value,
            b.stride(0) // UNIT.value,
            a_length // UNIT.value,
            b_length // UNIT.value,
            0 if bitmap is None else bitmap.numel(),
            RUNS=0 if p.runs is None else RUN,
            ELEMENTS=bitmap is not None,
            WHOLE_WORDS=b.shape[1] % WORD.value == 0,
            ACCUMULATE=accumulate,
            PRECISION="tf32" if work == "tf32" else "ieee",
            ROWS=p.tiling.rows,
            COLUMNS=p.tiling.columns,
            TOKENS=p.tiling.tokens,
            num_warps=p.tiling.warps,
            num_stages=p.tiling.stages,
        )


def _by_cublas(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """`aᵀ b` to `out` (rows, Q), or added; of `a` the first columns alone, the others are padding.

    A product for the few rows beyond a multiple of 8 takes about as long as one for 400 (60 µs for
    8,192 tokens on an H100): a small result is computed with the padding, and copied.
    """
    rows = len(out)
    if rows == a.shape[1] or 4 * a.shape[1] * b.shape[1] > MOST_COPIED_BYTES:
        fp32_product_by_eights(out, a[:, :rows], b, accumulate)
        return
    padded = out.new_empty(a.shape[1], b.shape[1])
    fp32_product_by_eights(padded, a, b, False)
    (out.add_ if accumulate else out.copy_)(padded[:rows])


def _cublas_is_here(a: Tensor) -> bool:
    return a.device.type == "cuda" and torch.version.hip is None


def arithmetic(dtype: torch.dtype) -> Arithmetic:
    """How factors of `dtype` are multiplied; fp32 as `torch.set_float32_matmul_precision` says."""
    if dtype in (torch.bfloat16, torch.float16):
        return "half"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def target_of(device: torch.device) -> str:
    """The target whose tilings suit `device` (the interpreter's CPU: any)."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major in (9, 10):
        return f"sm_{major}0"
    return "sm_80" if (major, minor) in ((8, 0), (8, 7)) else "sm_120"


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _aligned(x: Tensor) -> tuple[Tensor, int]:
    """`x` (N, P) with rows that begin at multiples of 16 bytes, and P rounded up to whole `UNIT`s.

    A copy only where `x` is not like that; what lies between P and the second number is read, but
    reaches no result.
    """
    n, p = x.shape
    length = triton.cdiv(p, UNIT.value) * UNIT.value
    end = x.storage_offset() + (n - 1) * x.stride(0) + length
    fits = end * x.element_size() <= x.untyped_storage().nbytes()
    rows_apart = x.stride(0) % UNIT.value == 0 and x.stride(0) >= 0
    if n and x.stride(1) == 1 and rows_apart and x.data_ptr() % 16 == 0 and fits:
        return x, length
    padded = x.new_zeros(n, length)
    padded[:, :p] = x
    return padded[:, :p], length
