"""A selection as bits, a part at a time: what a mask's digest is made of.

A few rows of a huge parameter are a small file; as bits at once they would be as large as the
parameter is said to be, and the file may lie.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lit_align.masks import bitmap as bits
from lit_align.masks.granularity import Selection, num_rows

PART = 1 << 22  # entries; a multiple of 8, so that parts end on a byte


def packed_parts(selection: Selection, part: int = PART) -> Iterator[bits.Bitmap]:
    """The bytes of `selection.packed()`, in consecutive parts of about `part` entries."""
    if selection.rows is None:
        yield selection.packed()
        return
    rows, length = selection.rows.numpy(), selection.shape[-1]
    if length > part:
        yield from _parts_of_long_rows(selection, part)
        return
    columns = np.zeros(length, np.bool_)
    if selection.axis == 1:
        columns[rows] = True
    count = max(part // length // 8, 1) * 8  # of rows in a part
    for first in range(0, num_rows(selection.shape, 0), count):
        last = min(first + count, num_rows(selection.shape, 0))
        if selection.axis == 1:
            yield bits.pack(np.tile(columns, last - first))
        else:
            flags = np.zeros((last - first, length), np.bool_)
            begin, end = np.searchsorted(rows, (first, last))
            flags[rows[begin:end] - first] = True
            yield bits.pack(flags.reshape(-1))


def _parts_of_long_rows(selection: Selection, part: int) -> Iterator[bits.Bitmap]:
    """Where a single row is longer than a part: every entry is asked for its row."""
    assert selection.rows is not None
    rows, length = selection.rows.numpy(), selection.shape[-1]
    for first in range(0, selection.numel, part):
        positions = np.arange(first, min(first + part, selection.numel))
        units = positions // length if selection.axis == 0 else positions % length
        at = np.searchsorted(rows, units)
        yield bits.pack(rows[np.minimum(at, len(rows) - 1)] == units)
