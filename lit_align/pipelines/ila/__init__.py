"""ILA, end to end."""

from lit_align.pipelines.ila.pipeline import ila

__all__ = ["ila"]
