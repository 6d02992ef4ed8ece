"""ONLY: train exactly the selected entries of a model."""

from lit_align.compact.delta import Delta, apply_delta, export_delta, merge, revert_delta
from lit_align.compact.reference import reference_policy
from lit_align.compact.restrict import head_handle, head_inputs, restrict
from lit_align.compact.state import links
from lit_align.compact.trainable import load_trainable, trainable
from lit_align.compact.write_through import sync

__all__ = [
    "Delta",
    "apply_delta",
    "export_delta",
    "head_handle",
    "head_inputs",
    "links",
    "load_trainable",
    "merge",
    "reference_policy",
    "restrict",
    "revert_delta",
    "sync",
    "trainable",
]
