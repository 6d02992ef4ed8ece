"""Callbacks: key parameters, predictions."""

from lit_align.callbacks.key_parameters import KeyParameterLocalization
from lit_align.callbacks.prediction import LogpsWriter

__all__ = ["KeyParameterLocalization", "LogpsWriter"]
