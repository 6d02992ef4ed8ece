"""ALLO, end to end."""

from lit_align.pipelines.allo.pipeline import allo

__all__ = ["allo"]
