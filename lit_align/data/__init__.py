"""Rows → tokens → batches."""

from lit_align.batch import CHOSEN, IGNORE_INDEX, REJECTED, PackedBatch
from lit_align.data.bad_rows import BadRowError, BadRows
from lit_align.data.datamodules import PreferenceDataModule, SFTDataModule, UnlearningDataModule
from lit_align.data.packing import collate
from lit_align.data.sampler import BatchSampler
from lit_align.data.schema import (
    PreferenceRow,
    SFTRow,
    TokenizedRow,
    TokenizedSequence,
    UnlearningRow,
)
from lit_align.data.tokenize import RowTokenizer, tokenize_row

__all__ = [
    "CHOSEN",
    "IGNORE_INDEX",
    "REJECTED",
    "BadRowError",
    "BadRows",
    "BatchSampler",
    "PackedBatch",
    "PreferenceDataModule",
    "PreferenceRow",
    "RowTokenizer",
    "SFTDataModule",
    "SFTRow",
    "TokenizedRow",
    "TokenizedSequence",
    "UnlearningDataModule",
    "UnlearningRow",
    "collate",
    "tokenize_row",
]
