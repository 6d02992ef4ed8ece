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
from lit_align.compact.delta import Delta, apply_delta, export_delta, merge, revert_delta
from lit_align.compact.reference import reference_policy
from lit_align.compact.restrict import head_handle, head_inputs, restrict
from lit_align.compact.state import links
from lit_align.compact.trainable import load_trainable, trainable
from lit_align.compact.write_through import sync

__all__ = [
    "AdapterSettings",
    "Delta",
    "add_adapters",
    "apply_adapters",
    "apply_delta",
    "export_delta",
    "has_adapters",
    "head_handle",
    "head_inputs",
    "links",
    "load_adapters",
    "load_trainable",
    "merge",
    "merge_adapters",
    "reference_policy",
    "restrict",
    "revert_delta",
    "save_adapters",
    "sync",
    "trainable",
    "without_adapters",
]
