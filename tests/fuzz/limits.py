"""A bound on memory, so that a test fails at once where a file's claim is believed."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def little_memory(mib: int = 512) -> Iterator[None]:
    """The process may take so much more address space than it has; more is a MemoryError."""
    status = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (int(line.split()[1]) for line in status if line.startswith("VmSize:"))
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, ((kib << 10) + (mib << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
