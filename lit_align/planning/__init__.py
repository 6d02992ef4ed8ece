"""What memory a run takes, found by running its training step on tensors without values."""

from lit_align.planning.model_configs import read_config, shipped_configs
from lit_align.planning.settings import PlanSettings
from lit_align.planning.sharding import on_each_device
from lit_align.planning.step import StepMemory, step_memory

__all__ = [
    "PlanSettings",
    "StepMemory",
    "on_each_device",
    "read_config",
    "shipped_configs",
    "step_memory",
]
