"""Kept for a moment: the batch moved to lit_align.batch."""

from lit_align.batch import CHOSEN, IGNORE_INDEX, REJECTED, PackedBatch

__all__ = ["CHOSEN", "IGNORE_INDEX", "REJECTED", "PackedBatch"]
