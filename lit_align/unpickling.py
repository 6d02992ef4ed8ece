"""What comes of reading a pickle that is damaged, or not of `torch.save`, without running it."""

import pickle
import struct

# `weights_only=True` lets nothing run, but what it meets in a damaged file it does not catch.
UNREADABLE_PICKLE: tuple[type[Exception], ...] = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    struct.error,
    pickle.UnpicklingError,
)
