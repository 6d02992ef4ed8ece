"""Cross-compile a kernel for a GPU that is not here, and read what came out.

    case = CompileCase("bf16", kernel, {"x_ptr": "*bf16", "n": "i32"}, {"BLOCK": 1024})
    report = compile_audit(case, "sm_90")

Registers, spills and shared memory come from the assembler; every access to global memory is led
back to its source line, whose trailing comment says what it is: `# stream` (contiguous data),
`# scattered` (addresses that depend on data) or `# table` (scalars, indices, tables).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import io
import linecache
import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from lit_align_kernels.audit import assembly

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
# Shared memory that one block may have, in KiB.
SHARED_LIMIT_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
TAGS = ("stream", "scattered", "table")
VECTOR_BYTES = 16


@dataclasses.dataclass(frozen=True)
class CompileCase:
    """A kernel as it is launched.

    Attributes:
        name: what is special about it.
        kernel: a `@triton.jit` function.
        signature: every argument that is not a constexpr → Triton's type (`*bf16`, `i64`, `fp32`).
            `:16` behind it: a multiple of 16; `:1`: not known to be one. Pointers are `:16` unless
            said otherwise, numbers `:1`.
        constexprs: the others.
        num_warps: warps of a program.
        num_stages: of software pipelining, or None for Triton's choice.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int | None = None


@dataclasses.dataclass(frozen=True)
class CompileReport:
    """What the assembler made of a case.

    Attributes:
        name: of the case.
        kernel: name of the function.
        target: compiled for.
        registers: of a thread.
        spills: bytes of registers spilled to memory and loaded from there (gfx942: registers).
        shared_bytes: shared memory of a block.
        accesses: tag → width in bytes → instructions; `untagged` where a line has no tag.
        matrix_instructions: name → how many: `wgmma`, `tcgen05`, `mma`, `mfma`.
        atomics: instructions that are atomic on global memory.
    """

    name: str
    kernel: str
    target: str
    registers: int
    spills: int
    shared_bytes: int
    accesses: dict[str, dict[int, int]]
    matrix_instructions: dict[str, int]
    atomics: int

    def wide_share(self, tag: str = "stream") -> float:
        """Share of a tag's accesses that are 16 bytes or wider; 1 where it has none."""
        widths = self.accesses.get(tag, {})
        wide = sum(count for width, count in widths.items() if width >= VECTOR_BYTES)
        return wide / sum(widths.values()) if widths else 1.0

    @property
    def all_accesses(self) -> dict[int, int]:
        """Width in bytes → instructions, whatever their tags."""
        found = collections.Counter[int]()
        for widths in self.accesses.values():
            found.update(widths)
        return dict(sorted(found.items()))

    @property
    def fits(self) -> bool:
        """Whether a block's shared memory exists on the target."""
        return self.shared_bytes <= SHARED_LIMIT_KIB[self.target] * 1024


def compile_audit(case: CompileCase, target: str) -> CompileReport:
    """Compile `case` for `target` (one of `TARGETS`) and report.

    Cases that differ by their names alone are compiled once in a process.

    Raises:
        ValueError: an argument of the kernel is in neither the signature nor the constexprs.
        triton.CompilationError: what the compiler says.
    """
    launch = (
        *(_unwrap(case.kernel), tuple(case.signature.items()), tuple(case.constexprs.items())),
        *(case.num_warps, case.num_stages, target),
    )
    if launch not in _reports:
        _reports[launch] = _report(case, target)
    return dataclasses.replace(_reports[launch], name=case.name)


_reports: dict[tuple[Any, ...], CompileReport] = {}


def _report(case: CompileCase, target: str) -> CompileReport:
    function = _unwrap(case.kernel)
    log = io.StringIO()
    with (
        triton.knobs.compilation.scope(),
        triton.knobs.nvidia.scope(),
        contextlib.redirect_stdout(log),
    ):
        triton.knobs.compilation.always_compile = True  # out of the cache comes no ptxas log
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = _compile(function, case, target)
    read = assembly.read_amd if target.startswith("gfx") else assembly.read_nvidia
    facts = read(compiled.asm, log.getvalue())
    return CompileReport(
        name=case.name,
        kernel=function.__name__,
        target=target,
        registers=facts.registers,
        spills=facts.spills,
        shared_bytes=compiled.metadata.shared,
        accesses=_by_tag(facts.accesses),
        matrix_instructions=facts.matrix_instructions,
        atomics=facts.atomics,
    )


def _unwrap(kernel: Any) -> JITFunction:
    while not isinstance(kernel, JITFunction):  # autotuned, or with heuristics
        kernel = kernel.fn
    return kernel


def _gpu(target: str) -> GPUTarget:
    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target[3:]), 32)
    return GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)


def _compile(function: JITFunction, case: CompileCase, target: str) -> Any:
    names = function.arg_names
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(names):
        if name in case.constexprs:
            signature[name] = "constexpr"
            continue
        if name not in case.signature:
            raise ValueError(
                f"{function.__name__}: {name!r} is in neither signature nor constexprs"
            )
        signature[name], _, divisible = case.signature[name].partition(":")
        if divisible == "16" or (not divisible and signature[name].startswith("*")):
            attributes[(i,)] = [["tt.divisibility", 16]]
    constants: dict[Any, Any] = {(names.index(k),): v for k, v in case.constexprs.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    options: dict[str, Any] = {"num_warps": case.num_warps}
    if case.num_stages is not None:
        options["num_stages"] = case.num_stages
    return triton.compile(source, target=_gpu(target), options=options)


def _by_tag(accesses: list[assembly.Access]) -> dict[str, dict[int, int]]:
    found: dict[str, collections.Counter[int]] = {}
    for access in accesses:
        found.setdefault(_tag(access.file, access.line), collections.Counter())[access.width] += 1
    return {tag: dict(sorted(widths.items())) for tag, widths in sorted(found.items())}


@functools.cache
def _tag(file: str, line: int) -> str:
    """The tag of a source line; a call over several lines carries it on any of them."""
    for number in range(line, line + 8):
        code, _, comment = linecache.getline(file, number).partition("#")
        tagged = re.match(r"\s*(stream|scattered|table)\b", comment)
        if tagged:
            return tagged.group(1)
        if code.rstrip().endswith(")"):
            break
    return "untagged"
