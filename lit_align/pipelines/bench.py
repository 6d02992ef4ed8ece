"""`lit-align bench`: the kernels timed on this device, or audited without one."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from lit_align.errors import BenchmarkError
from lit_align.files import write_atomically
from lit_align.report.kernel_figures import draw_measurements
from lit_align_kernels import benchmarks
from lit_align_kernels.benchmarks import Measurement, Size

DOCUMENT = Path("docs/KERNELS.md")


def bench(
    kernels: list[str] | None = None,
    size: Size | None = None,
    output: str = "runs/bench",
    audit: bool = False,
    document: str = str(DOCUMENT),
) -> None:
    """Time kernels against what else does the same; refuse where a kernel's result is wrong.

    On a GPU the Triton kernels against torch, torch.compile and Liger (where installed); on a CPU
    the torch paths against their plain equivalents. Writes `bench.json` and a plot for every
    kernel.

    Args:
        kernels: which; all where none is named.
        size: `tiny`, `small` or `full` (what the README quotes); by default `full` on a GPU and
            `small` on a CPU.
        output: folder of the results.
        audit: compile for five targets and count bytes instead (no GPU needed); takes minutes.
        document: file of the audit's tables.

    Raises:
        BenchmarkError: no such kernel, no Triton for the audit, or a wrong result: then nothing of
            that kernel is timed.
    """
    names = kernels or list(benchmarks.OPERATIONS)
    for name in names:
        if name not in benchmarks.OPERATIONS:
            known = ", ".join(benchmarks.OPERATIONS)
            raise BenchmarkError(f"no kernel {name!r}: choose from {known}")
    if audit:
        _audit(names, Path(document))
    else:
        _time(names, size, Path(output))


def _audit(names: list[str], document: Path) -> None:
    try:
        from lit_align_kernels.audit import table
    except ImportError as error:
        raise BenchmarkError(
            f"the audit compiles with Triton, which is missing: {error}"
        ) from error

    def say(message: str) -> None:
        print(message, file=sys.stderr)

    found = [one for name in names for one in table.audit(name, progress=say)]
    document.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(document, table.markdown(found).encode())
    print(document)


def _time(names: list[str], size: Size | None, output: Path) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = size or ("full" if device.type == "cuda" else "small")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ceilings = benchmarks.measure_ceilings(device, dtype, tiny=size == "tiny")
    print(
        f"{_device_name(device)}: copies {ceilings.copy_gb_per_s:.1f} GB/s, "
        f"{str(dtype).removeprefix('torch.')} products {ceilings.matmul_tflops:.3f} TFLOP/s"
    )
    found: list[Measurement] = []
    for name in names:
        for case in benchmarks.cases(name, size, device):
            try:
                measured = benchmarks.measure(case, device, ceilings, size)
            except benchmarks.CheckFailedError as error:
                raise BenchmarkError(str(error)) from error
            print("\n".join(_lines(measured)))
            found += measured
    _write(found, ceilings, device, size, output)


def _lines(measured: list[Measurement]) -> list[str]:
    first = measured[0]
    lines = [f"{first.operation}: {first.case}  {first.shapes}"]
    for m in measured:
        rates = f"{m.gb_per_s:9.1f} GB/s" if m.gb_per_s is not None else " " * 14
        rates += f"{m.tflops:8.3f} TFLOP/s" if m.tflops is not None else " " * 16
        lines.append(
            f"  {m.implementation:34s}{m.median_ms:10.3f} ms {m.ratio:6.2f} x{rates}"
            f" {m.share_of_ceiling:5.0%} of ceiling {m.peak_extra_mib:9.1f} MiB extra"
        )
    return lines


def _write(
    found: list[Measurement],
    ceilings: benchmarks.Ceilings,
    device: torch.device,
    size: Size,
    output: Path,
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "device": _device_name(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "size": size,
        "ceilings": dataclasses.asdict(ceilings),
        "measurements": [dataclasses.asdict(m) for m in found],
    }
    write_atomically(output / "bench.json", (json.dumps(record, indent=1) + "\n").encode())
    written = draw_measurements(found, output)
    print(f"{output / 'bench.json'} and {len(written)} plots")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
