"""WHICH entries of a model's parameters: masks, selections, and the exact top-k."""

from lit_align.masks.granularity import Selection
from lit_align.masks.heads import HeadLayout
from lit_align.masks.metadata import MaskMetadata
from lit_align.masks.parameter_mask import ParameterMask, named_shapes
from lit_align.masks.parts import PartialScores
from lit_align.masks.select import select
from lit_align.masks.units import conv1d_row_axes

__all__ = [
    "HeadLayout",
    "MaskMetadata",
    "ParameterMask",
    "PartialScores",
    "Selection",
    "conv1d_row_axes",
    "named_shapes",
    "select",
]
