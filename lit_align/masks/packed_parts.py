"""A selection as bits, a part at a time: what a mask's digest is made of.

A few rows of a huge parameter are a small file; as bits at once they would be as large as the
parameter is said to be, and the file may lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np

from lit_align.masks import bitmap as bits
from lit_align.masks.granularity import Selection, num_rows

PART = 1 << 22  # entries; a multiple of 8, so that parts end on a byte


def packed_parts(selection: Selection, part: int = PART) -> Iterator[bits.Bitmap]:
    """The bytes of `selection.packed()`, in consecutive parts of about `part` entries.

    At least 8 rows are a part, however long they are.
    """
    if selection.rows is None:
        yield selection.packed()
        return
    rows, length = selection.rows.numpy(), selection.shape[-1]
    columns = np.zeros(length, np.bool_)
    if selection.axis == 1:
        columns[rows], rows = True, rows[:0]
    without_rows = cache(lambda count: bits.pack(np.tile(columns, count)))
    step, total = max(part // length // 8, 1) * 8, num_rows(selection.shape, 0)
    for first in range(0, total, step):
        count = min(step, total - first)
        begin, end = np.searchsorted(rows, (first, first + count))
        if begin == end:
            yield without_rows(count)
        else:
            flags = np.zeros((count, length), np.bool_)
            flags[rows[begin:end] - first] = True
            yield bits.pack(flags.reshape(-1))
