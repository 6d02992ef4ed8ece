"""Peak resident memory of a piece of work, in MiB, from the operating system alone."""

import ctypes
import gc
import re
import sys
from pathlib import Path
from types import TracebackType

import torch

KIB_PER_MIB = 1024
CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


class PeakMemory:
    """Context manager that measures the peak resident memory of this process inside its block.

    Linux: the kernel's high-water mark (VmHWM) is reset on entry, by writing 5 to
    `/proc/self/clear_refs`, so that the peak belongs to the block. Elsewhere, and where the reset
    is not allowed, it is `getrusage`'s peak over the whole life of the process, and `scope` says
    so. Windows has neither. Child processes are not counted.

    Attributes:
        mib: The peak in MiB after the block; None where the system does not tell.
        before_mib: What was resident on entry; None where the mark cannot be reset.
        scope: "stage", "process" or "unknown".
    """

    mib: float | None = None
    before_mib: float | None = None
    scope: str = "unknown"

    def __enter__(self) -> "PeakMemory":
        """Give back what is no longer used, and reset the high-water mark where possible."""
        release_unused()
        try:
            CLEAR_REFS.write_text("5")
            self.scope = "stage"
            self.before_mib = _high_water_mib()
        except OSError:
            self.scope = "unknown" if sys.platform == "win32" else "process"
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Read the peak."""
        high_water = _high_water_mib() if self.scope == "stage" else None
        if high_water is not None:
            self.mib = high_water
        elif sys.platform != "win32":
            self.mib, self.scope = _process_peak_mib(), "process"


def _high_water_mib() -> float | None:
    found = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    return int(found.group(1)) / KIB_PER_MIB if found else None


def _process_peak_mib() -> float:
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024
    return peak * bytes_per_unit / (KIB_PER_MIB * 1024)


def release_unused() -> None:
    """Collect garbage, trainers being full of cycles, and give freed memory back to the system."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
        if trim is not None:
            trim(0)


def peak_memory_mib(device: torch.device) -> float:
    """Most memory that was ever in use, MiB: the allocator's on a GPU, the process's on a CPU.

    NaN where the system does not tell (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / (KIB_PER_MIB * 1024)
    return float("nan") if sys.platform == "win32" else _process_peak_mib()
