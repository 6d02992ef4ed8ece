"""Callbacks: checkpoints, locks, key parameters, milestones, stability, predictions."""

from lit_align.callbacks.checkpointing import Checkpointing
from lit_align.callbacks.key_parameters import KeyParameterLocalization
from lit_align.callbacks.locked_folder import LockedFolder
from lit_align.callbacks.milestones import KeepMilestones
from lit_align.callbacks.prediction import LogpsWriter
from lit_align.callbacks.stability import StopWhenStable

__all__ = [
    "Checkpointing",
    "KeepMilestones",
    "KeyParameterLocalization",
    "LockedFolder",
    "LogpsWriter",
    "StopWhenStable",
]
