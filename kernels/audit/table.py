"""The audit of every kernel as tables: what was compiled, and what was counted."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import triton

from lit_align_kernels.audit import liger
from lit_align_kernels.audit.compiled import TARGETS, VECTOR_BYTES, CompileReport, compile_audit
from lit_align_kernels.audit.interpreter import interpreted
from lit_align_kernels.audit.traffic import TrafficCase, traffic

OPERATIONS = (
    "masked_adamw",
    "token_logprobs",
    "weighted_preference_loss",
    "masked_weight_grad",
    "swap_selected",
)
# Operations that Liger has too, each with what it calls them.
LIGER_OPERATIONS = {"weighted_preference_loss": "Liger, cross-entropy and its gradient"}


@dataclasses.dataclass(frozen=True)
class TrafficReport:
    """What a case moved in the interpreter.

    Attributes:
        name: of the case.
        minimum_bytes: what any implementation has to move.
        moved_bytes: by the program text.
        unique_bytes: distinct ones.
        sector_bytes: of the 32-byte sectors touched.
        out_of_bounds: lanes outside every tensor.
        races: elements on which two programs, or two lanes of a store, do not agree.
        extra_bytes: what torch moves around the kernel; contained in the three above.
    """

    name: str
    minimum_bytes: int
    moved_bytes: int
    unique_bytes: int
    sector_bytes: int
    out_of_bounds: int
    races: int
    extra_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class OperationAudit:
    """Everything about one operation.

    Attributes:
        operation: its name.
        notes: what its audit module says about it.
        compiled: a report for every case and target.
        counted: a report for every case of traffic.
    """

    operation: str
    notes: str
    compiled: list[CompileReport]
    counted: list[TrafficReport]


def traffic_audit(case: TrafficCase) -> TrafficReport:
    """Run `case` in the interpreter and count."""
    with interpreted(), traffic(case.tensors) as seen:
        case.call()
    return TrafficReport(
        name=case.name,
        minimum_bytes=case.minimum_bytes,
        moved_bytes=seen.moved + case.extra_bytes,
        unique_bytes=seen.unique + case.extra_bytes,
        sector_bytes=seen.sectors + case.extra_bytes,
        out_of_bounds=seen.out_of_bounds,
        races=seen.races,
        extra_bytes=case.extra_bytes,
    )


def audit(
    operation: str,
    targets: Sequence[str] = TARGETS,
    progress: Callable[[str], None] = lambda _: None,
) -> list[OperationAudit]:
    """Ours, and Liger's where it is installed and has the same operation.

    Raises:
        ValueError: there is no such operation.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"no kernel {operation!r}: choose from {', '.join(OPERATIONS)}")
    module = importlib.import_module(f"lit_align_kernels.{operation}.audit")
    audits = [_audit(operation, module, targets, progress)]
    if operation in LIGER_OPERATIONS and liger.is_installed():
        audits.append(_audit(LIGER_OPERATIONS[operation], liger, targets, progress))
    return audits


def _audit(
    name: str, module: Any, targets: Sequence[str], progress: Callable[[str], None]
) -> OperationAudit:
    compiled = []
    for target in targets:
        progress(f"{name}: compiling for {target}")
        compiled += [compile_audit(case, target) for case in module.compile_cases(target)]
    progress(f"{name}: counting")
    counted = [traffic_audit(case) for case in module.traffic_cases()]
    return OperationAudit(name, (module.__doc__ or "").strip(), compiled, counted)


def markdown(audits: Iterable[OperationAudit]) -> str:
    """All tables as one Markdown text."""
    parts = [_HEAD.format(triton=triton.__version__, liger=_liger_version())]
    for one in audits:
        parts += [f"## {one.operation}", one.notes, _compiled_table(one), _counted_table(one)]
    return "\n\n".join(parts) + "\n"


_HEAD = """# Kernels

Written by `lit-align bench --audit`; do not edit. Triton {triton}, Liger {liger}.

What stands here needs no GPU: it was compiled by Triton for five targets and read from the machine
code, or counted in Triton's interpreter on a CPU. Values and gradients are tested against fp64 in
the interpreter, and compiled on an NVIDIA H100 (sm_90, `make test-gpu`); on the other four targets
nothing has run. How fast the kernels were on that H100 stands in RESULTS.md; `lit-align bench` says
it of your GPU.

- *registers* of a thread; *spills* in bytes (gfx942: registers); *shared* memory of a block.
- *all ≥ 16 B*: how many of all instructions that access global memory move at least 16 bytes a
  thread. *stream*: the same of accesses to contiguous data (moments, masters, gradients, logits,
  values) alone; "–" for Liger, whose accesses nobody has sorted: compare by the column of all.
  *scattered*: accesses whose address depends on the mask; *table*: scalars, indices, bitmap words.
  Both as count × bytes.
- *moved ÷ minimum*: bytes of all active lanes by the program text over what any implementation has
  to move; *unique ÷ minimum*: distinct bytes alone, where a cache serves the second read;
  *sectors ÷ moved*: what 32-byte sectors add; *by torch ÷ minimum*: of these, what torch moves
  around the kernel (sectors read, bytes written).
- *out of bounds*: lanes that touch what lies outside every tensor. A tensor goes from its first
  element to its last, gaps between its rows included; a load may begin at the multiple of 16 bytes
  before it, and read the gap behind its last row.
- *races*: elements that two programs store, or one stores and another loads, or that two lanes of
  one store share. Not covered: races between the warps of a program on different accesses, such as
  a load of what another warp stores later; there a barrier has to lie between (see the comment in
  the token-NPO kernel)."""


def _liger_version() -> str:
    if not liger.is_installed():
        return "not installed"
    return importlib.metadata.version("liger-kernel")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _compiled_table(one: OperationAudit) -> str:
    head = (
        "case",
        "target",
        "registers",
        "spills",
        "shared KiB",
        "all ≥ 16 B",
        "stream ≥ 16 B",
        "scattered",
        "table",
        "matrix",
    )
    rows = [
        (
            r.name,
            r.target,
            str(r.registers),
            str(r.spills),
            f"{r.shared_bytes / 1024:.1f}",
            _wide(r.all_accesses),
            _wide(r.accesses.get("stream", {})),
            _widths(r, "scattered"),
            _widths(r, "table"),
            ", ".join(f"{kind} × {n}" for kind, n in r.matrix_instructions.items()) or "–",
        )
        for r in one.compiled
    ]
    return _table(head, rows)


def _wide(widths: dict[int, int]) -> str:
    wide = sum(n for width, n in widths.items() if width >= VECTOR_BYTES)
    return f"{wide}/{sum(widths.values())}" if widths else "–"


def _widths(report: CompileReport, tag: str) -> str:
    widths = report.accesses.get(tag, {})
    return ", ".join(f"{n} × {width}" for width, n in sorted(widths.items())) or "–"


def _counted_table(one: OperationAudit) -> str:
    head = (
        "case",
        "minimum KiB",
        "moved ÷ minimum",
        "unique ÷ minimum",
        "sectors ÷ moved",
        "by torch ÷ minimum",
        "out of bounds",
        "races",
    )
    rows = [
        (
            c.name,
            f"{c.minimum_bytes / 1024:.1f}",
            f"{c.moved_bytes / c.minimum_bytes:.3f}",
            f"{c.unique_bytes / c.minimum_bytes:.3f}",
            f"{c.sector_bytes / c.moved_bytes:.2f}",
            f"{c.extra_bytes / c.minimum_bytes:.3f}" if c.extra_bytes else "–",
            str(c.out_of_bounds),
            str(c.races),
        )
        for c in one.counted
    ]
    return _table(head, rows)
