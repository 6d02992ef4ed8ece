"""ONLY: train exactly the selected entries of a model."""

from lit_align.compact.adapters import (
    AdapterSettings,
    add_adapters,
    apply_adapters,
    has_adapters,
    load_adapters,
    merge_adapters,
    save_adapters,
    without_adapters,
)
from lit_align.compact.change import Change, read_change, save_change
from lit_align.compact.delta import Delta, apply_delta, export_delta, merge, revert_delta
from lit_align.compact.fast_products import use_fast_products
from lit_align.compact.gates import LayerGates, closed_gates, gate, layer_gates, open_gates
from lit_align.compact.low_rank import LowRank
from lit_align.compact.reference import reference_policy
from lit_align.compact.restrict import head_handle, head_inputs, restrict
from lit_align.compact.state import links
from lit_align.compact.trainable import load_trainable, trainable
from lit_align.compact.write_through import sync

__all__ = [
    "AdapterSettings",
    "Change",
    "Delta",
    "LayerGates",
    "LowRank",
    "add_adapters",
    "apply_adapters",
    "apply_delta",
    "closed_gates",
    "export_delta",
    "gate",
    "has_adapters",
    "head_handle",
    "head_inputs",
    "layer_gates",
    "links",
    "load_adapters",
    "load_trainable",
    "merge",
    "merge_adapters",
    "open_gates",
    "read_change",
    "reference_policy",
    "restrict",
    "revert_delta",
    "save_adapters",
    "save_change",
    "sync",
    "trainable",
    "use_fast_products",
    "without_adapters",
]
