"""Look at masks, compare, combine, draw and convert them."""

from lit_align.pipelines.workbench.conversion import convert
from lit_align.pipelines.workbench.verbs import combine, compare, plot, show

__all__ = ["combine", "compare", "convert", "plot", "show"]
