"""`lit-align bench training`: DPO by lit-align and by what else does it, on the same pairs."""

from lit_align.pipelines.training_bench.command import training_command

__all__ = ["training_command"]
