"""lit-align: find the few parameters that matter, and train only those."""

__version__ = "0.1.0"
