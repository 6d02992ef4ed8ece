"""ALPS, end to end."""

from lit_align.pipelines.alps.pipeline import alps

__all__ = ["alps"]
