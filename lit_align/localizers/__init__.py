"""WHY entries are chosen: scores of parameters, and nothing else; `lit_align.masks` selects."""

from lit_align.localizers.baselines import magnitude_scores, random_scores
from lit_align.localizers.gradient import gradient_scores
from lit_align.localizers.head_distance import (
    HeadDistance,
    head_distance_mask,
    head_distance_scores,
)
from lit_align.localizers.layer_gate import LayerScores, layer_gate_mask, read_scores
from lit_align.localizers.lazy import ElementwiseScores, LazyScores
from lit_align.localizers.weight_change import (
    check_cut,
    select_by_weight_change,
    weight_change_scores,
)

__all__ = [
    "ElementwiseScores",
    "HeadDistance",
    "LayerScores",
    "LazyScores",
    "check_cut",
    "gradient_scores",
    "head_distance_mask",
    "head_distance_scores",
    "layer_gate_mask",
    "magnitude_scores",
    "random_scores",
    "read_scores",
    "select_by_weight_change",
    "weight_change_scores",
]
