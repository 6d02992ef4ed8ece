"""Where in the weight the selected entries of a block lie: helpers of kernels, in Triton.

A program handles `BLOCK` consecutive selected entries ("lanes"), so that everything stored
compactly (masters, gradients, moments, values) is read and written as one aligned stream, and only
the weight is addressed entry by entry. `kernels/launch_tables.py` prepares the tables. `KIND`:

    all         entry i lies at position i
    rows        rows of at least BLOCK entries: a block touches two of them at most
    short_rows  shorter rows: as many as a block can touch
    index       a list of positions
    bitmap      one bit for every position of the weight; the rank is computed here
"""

from __future__ import annotations

import triton
import triton.language as tl

# Columns of the table that describes the parameters of a launch, one row (int64) each.
NUMEL = tl.constexpr(0)  # selected entries
WEIGHT = tl.constexpr(1)  # address, as the next two
INDEX = tl.constexpr(2)  # rows, positions or words of the bitmap
SPANS = tl.constexpr(3)  # first word and rank of every block
ROW_LENGTH = tl.constexpr(4)
ROW_STRIDE = tl.constexpr(5)  # from one row of the weight to the next
ENTRY_STRIDE = tl.constexpr(6)  # from one entry of a row to the next
ROWS = tl.constexpr(7)  # how many
OWN = tl.constexpr(8)  # first column of the operation's own
COLUMNS = tl.constexpr(16)


@triton.jit
def field(parameter, column: tl.constexpr):
    """One number out of a parameter's row of the table."""
    return tl.load(parameter + column)  # table


@triton.jit
def pointer(parameter, column: tl.constexpr, ALIGNED: tl.constexpr, dtype: tl.constexpr):
    """An address out of a parameter's row; ALIGNED promises that 16 divides it."""
    found = tl.load(parameter + column).to(tl.pointer_type(dtype))  # table
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def weight_pointer(parameter, KIND: tl.constexpr, EVEN: tl.constexpr, dtype: tl.constexpr):
    """The weight's address; EVEN of a list of positions says nothing about the weight."""
    return pointer(parameter, WEIGHT, EVEN and KIND != "index", dtype)


@triton.jit
def entries_of_program(table, programs, ENTRIES: tl.constexpr):
    """The parameter's row, and the first of its entries in this program, of ENTRIES at most."""
    program = programs + 2 * tl.program_id(0).to(tl.int64)
    parameter = table + tl.load(program).to(tl.int64) * COLUMNS  # table
    return parameter, tl.load(program + 1).to(tl.int64) * ENTRIES  # table


@triton.jit
def positions_in_block(
    parameter, start, count, KIND: tl.constexpr, INDEX_TYPE: tl.constexpr,
    EVEN: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Row-major position in the weight of the entries of a block: (BLOCK,).

    Lanes from `count` on have no meaning. EVEN: 16 divides the weight's address and the length of a
    row; for a list of positions: the list's address.
    """
    lane = tl.arange(0, BLOCK)
    if KIND == "all":
        found = start + lane
    elif KIND == "index":
        index = pointer(parameter, INDEX, EVEN, INDEX_TYPE)
        whole = tl.multiple_of(count // 16 * 16, 16)
        found = tl.load(index + start + lane, mask=lane < whole, other=0)  # table
    elif KIND == "bitmap":
        found = _positions_in_bitmap(parameter, start // BLOCK, INDEX_TYPE, BLOCK, TILE)
    elif KIND == "rows":
        found = _positions_in_two_rows(parameter, start, lane, EVEN)
    else:
        found = _positions_in_short_rows(parameter, start, count, lane, EVEN, BLOCK)
    return found


@triton.jit
def rest_of_block(rest, positions, whole, count, KIND: tl.constexpr):
    """Positions of the up to 15 entries from lane `whole` on, where a block has some: (16,)."""
    if KIND != "all" and KIND != "index":  # noqa: SIM102 (known when compiling, unlike the next)
        if whole < count:
            rest = tl.gather(positions, whole + tl.arange(0, 16), 0).to(tl.int64)
    return rest


@triton.jit
def positions_of_rest(parameter, entry, mask, rest, KIND: tl.constexpr, INDEX_TYPE: tl.constexpr):
    """Positions of the last entries of a parameter; `rest` is what the blocks found: (16,)."""
    if KIND == "all":
        rest = entry
    elif KIND == "index":
        index = pointer(parameter, INDEX, False, INDEX_TYPE)
        rest = tl.load(index + entry, mask=mask, other=0).to(tl.int64)  # table
    return rest


@triton.jit
def _positions_in_two_rows(parameter, start, lane, EVEN: tl.constexpr):
    rows = pointer(parameter, INDEX, False, tl.int64)
    length, row_stride = field(parameter, ROW_LENGTH), field(parameter, ROW_STRIDE)
    first = start // length
    row = tl.load(rows + first)  # table
    next_row = tl.load(rows + first + 1, mask=first + 1 < field(parameter, ROWS), other=0)  # table
    entry = start - first * length + lane
    base, next_base = row * row_stride, next_row * row_stride
    stride = field(parameter, ENTRY_STRIDE)
    found = tl.where(entry < length, base + entry * stride, next_base + (entry - length) * stride)
    if EVEN:
        found = tl.max_contiguous(tl.multiple_of(found, 16), 16)
    return found


@triton.jit
def _positions_in_short_rows(
    parameter, start, count, lane, EVEN: tl.constexpr, BLOCK: tl.constexpr
):
    rows = pointer(parameter, INDEX, False, tl.int64)
    length = field(parameter, ROW_LENGTH).to(tl.int32)  # table
    first = start // length
    entry = (start - first * length).to(tl.int32) + lane
    touched = (entry // length).to(tl.int32)
    last = tl.max(tl.where(lane < count, touched, 0))
    row = tl.load(rows + first + lane, mask=lane <= last, other=0)  # table
    row = tl.gather(row, tl.minimum(touched, BLOCK - 1), 0)
    inside = (entry - touched * length).to(tl.int64)
    found = row * field(parameter, ROW_STRIDE) + inside * field(parameter, ENTRY_STRIDE)
    if EVEN:
        found = tl.max_contiguous(tl.multiple_of(found, 16), 16)
    return found


@triton.jit
def _positions_in_bitmap(
    parameter, block, INDEX_TYPE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """Read the words that the block spans, TILE at a time, and select by rank.

    Entry j of the block lies in the word before which at most j of the block's entries lie: as many
    words come before it as end at or before rank j, which a histogram of the ends, summed up, says.
    """
    words = pointer(parameter, INDEX, False, tl.int32)
    span = pointer(parameter, SPANS, False, tl.int32) + 2 * block
    first = tl.load(span)  # table
    before = -tl.load(span + 1)  # table
    last = tl.load(span + 2)  # table
    lane, at = tl.arange(0, BLOCK), tl.arange(0, TILE)
    found = tl.zeros((BLOCK,), INDEX_TYPE)
    for start in range(first, last + 1, TILE):
        word = tl.load(words + start + at, mask=start + at <= last, other=0)  # table
        bits = popcount(word.to(tl.uint32, bitcast=True)).to(tl.int32)
        end = before + tl.cumsum(bits, 0)
        owner = tl.cumsum(tl.histogram(end, BLOCK, mask=end < BLOCK), 0)
        owner = tl.minimum(owner, TILE - 1)
        rank = lane - tl.gather(end - bits, owner, 0)
        bit = select_bit(tl.gather(word, owner, 0).to(tl.uint32, bitcast=True), rank)
        after = before + tl.sum(bits, 0)
        here = (lane >= before) & (lane < after)
        found = tl.where(here, (start + owner).to(INDEX_TYPE) * 32 + bit, found)
        before = after
    return found


@triton.jit
def popcount(word):
    """Bits that are set in uint32 words (a form that compilers know as one instruction)."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return (word * 0x01010101) >> 24


@triton.jit
def select_bit(word, rank):
    """Number of the set bit of a uint32 word before which `rank` set bits lie: int32.

    Sums of 2, 4, 8 and 16 neighbouring bits side by side, then a binary search through them.
    """
    twos = word - ((word >> 1) & 0x55555555)
    fours = (twos & 0x33333333) + ((twos >> 2) & 0x33333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F
    rank = rank.to(tl.uint32)
    bit = tl.zeros_like(rank)
    rank, bit = _halve(eights + (eights >> 8), rank, bit, 16, 31)
    rank, bit = _halve(eights, rank, bit, 8, 15)
    rank, bit = _halve(fours, rank, bit, 4, 7)
    rank, bit = _halve(twos, rank, bit, 2, 3)
    rank, bit = _halve(word, rank, bit, 1, 1)
    return bit.to(tl.int32)


@triton.jit
def _halve(sums, rank, bit, HALF: tl.constexpr, MASK: tl.constexpr):
    lower = (sums >> bit) & MASK
    upper = rank >= lower
    return tl.where(upper, rank - lower, rank), tl.where(upper, bit + HALF, bit)
