"""`lit-align bench`: the kernels timed on this device, or audited without one; training."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lit_align.errors import BenchmarkError
from lit_align.files import write_atomically
from lit_align.pipelines.training_bench.command import training_command
from lit_align.report.kernel_figures import draw_measurements
from lit_align_kernels import benchmarks, dispatch
from lit_align_kernels.benchmarks import Ceilings, LeftOut, Measurement, Size

DOCUMENT = Path("docs/KERNELS.md")
OUTPUT = "runs/bench"
TRAINING = "training"


def parser() -> argparse.ArgumentParser:
    """The command line of `bench`: words in any order are kernels, `--audit` is a flag."""
    found = argparse.ArgumentParser(
        prog="lit-align bench",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Time kernels against what else does the same, or audit them without a GPU.\n"
        "A kernel whose result is wrong is refused; a competitor's that is wrong is left out.",
        epilog="kernels: " + ", ".join(benchmarks.OPERATIONS) + "\n"
        "`lit-align bench training` compares whole training runs: its --help tells more.",
    )
    add = found.add_argument
    add("kernels", nargs="*", metavar="kernel", help="which; all where none is named")
    add(
        "--size",
        choices=benchmarks.SIZES,
        help="full is what the README quotes; by default full on a GPU and small on a CPU",
    )
    add("--output", default=OUTPUT, help="folder of bench.json and the plots (%(default)s)")
    add(
        "--audit",
        action="store_true",
        help="compile for five targets and count bytes instead; no GPU needed, takes minutes",
    )
    add(
        "--document",
        help=f"file of the audit's tables; by default {DOCUMENT} for all kernels, and standard "
        "output for some of them",
    )
    return found


def bench_command(words: Sequence[str]) -> None:
    """`bench` with the words of a command line; `training` first: whole runs, not kernels."""
    if words and words[0] == TRAINING:
        training_command(words[1:])
        return
    bench(**vars(parser().parse_intermixed_args(list(words))))


def bench(
    kernels: Sequence[str] = (),
    size: Size | None = None,
    output: str = OUTPUT,
    audit: bool = False,
    document: str | None = None,
) -> None:
    """Time kernels against what else does the same; refuse where a kernel's result is wrong.

    On a GPU the Triton kernels against torch, torch.compile and Liger (where installed); on a CPU
    the torch paths against their plain equivalents. A competitor that raises or is wrong is named
    and left out. Writes `bench.json` after every case and a plot for every kernel.

    Args:
        kernels: which; all where none is named.
        size: `tiny`, `small` or `full` (what the README quotes); by default `full` on a GPU and
            `small` on a CPU.
        output: folder of the results.
        audit: compile for five targets and count bytes instead (no GPU needed); takes minutes.
        document: file of the audit's tables; None: docs/KERNELS.md for all kernels, standard output
            for some of them.

    Raises:
        BenchmarkError: no such kernel, no Triton for the audit, no matplotlib for the plots,
            LIT_ALIGN_KERNELS asks for what cannot run here, or a kernel's result is wrong: that
            case is not timed, and the earlier ones are kept.
    """
    names = list(dict.fromkeys(kernels)) or list(benchmarks.OPERATIONS)
    for name in names:
        if name not in benchmarks.OPERATIONS:
            known = ", ".join(benchmarks.OPERATIONS)
            raise BenchmarkError(f"no kernel {name!r}: choose from {known}")
    if audit:
        _audit(names, _document(names, document))
    else:
        _time(names, size, Path(output))


def _document(names: list[str], document: str | None) -> Path | None:
    """Where the audit's tables go: None is standard output."""
    if document is None and set(names) != set(benchmarks.OPERATIONS):
        return None
    path = DOCUMENT if document is None else Path(document)
    if document is None and not path.parent.is_dir():
        raise BenchmarkError(f"no folder {path.parent}/ here: name the tables' file by --document")
    if path.is_dir():
        raise BenchmarkError(f"{path} is a folder: name a file by --document")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _audit(names: list[str], document: Path | None) -> None:
    try:
        from lit_align_kernels.audit import table
    except ImportError as error:
        raise BenchmarkError(
            f"the audit compiles with Triton, which is missing: {error}"
        ) from error

    def say(message: str) -> None:
        print(message, file=sys.stderr)

    text = table.markdown([one for name in names for one in table.audit(name, progress=say)])
    if document is None:
        print(text, end="")
        return
    write_atomically(document, text.encode())
    print(document)


def _check_environment(names: list[str], device: torch.device, output: Path) -> None:
    """Find out before the minutes of timing what would end them."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise BenchmarkError(
            f'the plots need matplotlib ({error}): pip install "lit-align[report]"'
        ) from error
    for name in names:
        try:
            dispatch.implementation_for(name, device)
        except (ValueError, NotImplementedError) as error:
            raise BenchmarkError(str(error)) from error
    if output.exists() and not output.is_dir():
        raise BenchmarkError(f"{output} is a file: name a folder by --output")
    output.mkdir(parents=True, exist_ok=True)


def _time(names: list[str], size: Size | None, output: Path) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = size or ("full" if device.type == "cuda" else "small")
    dtype = benchmarks.dtype_of(device)
    _check_environment(names, device, output)
    ceilings = benchmarks.measure_ceilings(device, dtype, tiny=size == "tiny")
    print(
        f"{_device_name(device)}: copies {ceilings.copy_gb_per_s:.1f} GB/s, "
        f"{str(dtype).removeprefix('torch.')} products {ceilings.matmul_tflops:.3f} TFLOP/s"
    )
    record = _Record(device, size, ceilings, output)
    for name in names:
        for case in benchmarks.cases(name, size, device):
            try:
                measured, left_out = benchmarks.measure(case, device, ceilings, size)
            except benchmarks.CheckFailedError as error:
                raise BenchmarkError(str(error)) from error
            print("\n".join(_lines(measured)), flush=True)
            for one in left_out:
                print(f"  {one.implementation} is left out: {one.reason}", flush=True)
            record.add(measured, left_out)
    print(f"{output / 'bench.json'} and {len(names)} plots")


def _lines(measured: list[Measurement]) -> list[str]:
    first = measured[0]
    lines = [f"{first.operation}: {first.case}  {first.shapes}"]
    for m in measured:
        ratio = " " * 8 if m.ratio is None else f"{m.ratio:6.2f} x"
        rates = f"{m.gb_per_s:9.1f} GB/s" if m.gb_per_s is not None else " " * 14
        rates += f"{m.tflops:8.3f} TFLOP/s" if m.tflops is not None else " " * 16
        lines.append(
            f"  {m.implementation:34s}{m.median_ms:10.3f} ms {ratio}{rates}"
            f" {m.share_of_ceiling:5.0%} of ceiling {m.peak_extra_mib:9.1f} MiB extra"
        )
    return lines


@dataclasses.dataclass
class _Record:
    """What was found so far, on disk after every case."""

    device: torch.device
    size: Size
    ceilings: Ceilings
    output: Path
    measurements: list[Measurement] = dataclasses.field(default_factory=list)
    left_out: list[LeftOut] = dataclasses.field(default_factory=list)

    def add(self, measured: list[Measurement], left_out: list[LeftOut]) -> None:
        """Write `bench.json`, and the plot of these measurements' kernel anew."""
        self.measurements += measured
        self.left_out += left_out
        record: dict[str, Any] = {
            "device": _device_name(self.device),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "size": self.size,
            "ceilings": dataclasses.asdict(self.ceilings),
            "measurements": [dataclasses.asdict(m) for m in self.measurements],
            "left_out": [dataclasses.asdict(one) for one in self.left_out],
        }
        text = json.dumps(record, indent=1) + "\n"
        write_atomically(self.output / "bench.json", text.encode())
        kernel = measured[0].operation
        draw_measurements([m for m in self.measurements if m.operation == kernel], self.output)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
