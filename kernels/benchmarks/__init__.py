"""Time the kernels against what else does the same: `lit-align bench`."""

from lit_align_kernels.benchmarks.case import SIZES, BenchmarkCase, CheckFailedError, Size, dtype_of
from lit_align_kernels.benchmarks.ceilings import Ceilings, measure_ceilings
from lit_align_kernels.benchmarks.run import OPERATIONS, LeftOut, Measurement, cases, measure

__all__ = [
    "OPERATIONS",
    "SIZES",
    "BenchmarkCase",
    "Ceilings",
    "CheckFailedError",
    "LeftOut",
    "Measurement",
    "Size",
    "cases",
    "dtype_of",
    "measure",
    "measure_ceilings",
]
