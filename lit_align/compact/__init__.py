"""ONLY: train exactly the selected entries of a model."""

from lit_align.compact.reference import reference_policy
from lit_align.compact.restrict import head_handle, restrict
from lit_align.compact.state import links
from lit_align.compact.write_through import sync

__all__ = ["head_handle", "links", "reference_policy", "restrict", "sync"]
