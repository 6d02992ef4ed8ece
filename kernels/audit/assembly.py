"""Read compiled kernels: SASS of a cubin, and AMD's assembly."""

from __future__ import annotations

import collections
import dataclasses
import re
import subprocess
import tempfile
from typing import Any

import triton

AMD_WIDTHS = {
    "dwordx4": 16, "b128": 16, "dwordx3": 12, "b96": 12, "dwordx2": 8, "b64": 8, "dword": 4,
    "b32": 4, "ushort": 2, "short": 2, "short_d16": 2, "short_d16_hi": 2, "u16": 2, "b16": 2,
    "ubyte": 1, "byte": 1, "sbyte": 1, "u8": 1, "b8": 1, "ubyte_d16": 1, "sbyte_d16": 1,
}  # fmt: skip
NVIDIA_ACCESSES = {"LDG", "STG", "LDGSTS"}
ATOMICS = {"ATOMG", "RED", "REDG", "ATOM"}


@dataclasses.dataclass(frozen=True)
class Access:
    """One instruction that reads or writes global memory.

    Attributes:
        width: bytes a thread moves with it.
        file: source file of the line that it comes from.
        line: number of that line, 0 where it is not known.
    """

    width: int
    file: str
    line: int


@dataclasses.dataclass
class Facts:
    """What a compiled kernel consists of; see `CompileReport` for the fields."""

    registers: int
    spills: int
    accesses: list[Access]
    matrix_instructions: dict[str, int]
    atomics: int


def sources_of_ptx(ptx: str) -> list[tuple[str, int]]:
    """Source file and number of the line that each line of PTX comes from, which count from 1.

    Triton writes global accesses as inline assembly of several lines, and LLVM counts the source
    line up with each: only the first place that such a block names is right.
    """
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', ptx, re.M))
    sources, place = [("", 0)], ("", 0)
    inside = named = False
    for row in ptx.split("\n"):
        if "begin inline asm" in row:
            inside, named = True, False
        elif "end inline asm" in row:
            inside = False
        elif (found := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", row)) and not (inside and named):
            place, named = (files[found.group(1)], int(found.group(2))), True
        sources.append(place)
    return sources


def read_nvidia(asm: dict[str, Any], ptxas_log: str) -> Facts:
    """Facts of a cubin and of what ptxas printed about it.

    Accesses are led back by way of the PTX: in the table of source lines proper, ptxas leaves out
    that the file changes where the number of the line stays the same.

    Raises:
        subprocess.CalledProcessError: the disassembler refused the cubin.
    """
    accesses, matrix, atomics = [], collections.Counter[str](), 0
    sources = sources_of_ptx(asm["ptx"])
    place = sources[0]
    for text in _disassembled(asm["cubin"]).splitlines():
        if found := re.search(r'//## File "\.nv_debug_ptx_txt", line (\d+)', text):
            place = sources[int(found.group(1))]
            continue
        parts = _sass_opcode(text)
        if not parts:
            continue
        if parts[0] in NVIDIA_ACCESSES:
            accesses.append(Access(_sass_width(parts), *place))
        elif parts[0] in ATOMICS:
            atomics += 1
        elif kind := _sass_matrix(parts[0]):
            matrix[kind] += 1
    spills = sum(_number(rf"(\d+) bytes spill {what}", ptxas_log) for what in ("stores", "loads"))
    registers = _number(r"Used (\d+) registers", ptxas_log)
    return Facts(registers, spills, accesses, dict(matrix), atomics)


def _disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.nvdisasm.path
        command = [tool, "--print-line-info-ptx", "--print-code", "--no-dataflow", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _sass_opcode(text: str) -> list[str]:
    found = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text)
    return found.group(1).split(".") if found else []


def _sass_width(parts: list[str]) -> int:
    widths = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((widths[p] for p in parts[1:] if p in widths), 4)


def _sass_matrix(opcode: str) -> str | None:
    if opcode in ("HGMMA", "IGMMA", "QGMMA"):
        return "wgmma"
    if opcode.startswith("UTC") and "MMA" in opcode:
        return "tcgen05"
    return "mma" if opcode in ("HMMA", "IMMA", "QMMA", "OMMA", "DMMA") else None


def read_amd(asm: dict[str, Any], _: str) -> Facts:
    """Facts of AMD's assembly."""
    text = asm["amdgcn"]
    files = {
        int(number): f"{folder}/{name}" if folder and not name.startswith("/") else name
        for number, folder, name in re.findall(
            r'^\s*\.file\s+(\d+)\s+(?:"([^"]*)"\s+)?"([^"]*)"', text, re.M
        )
    }
    accesses = []
    file, line = "", 0
    for row in text.splitlines():
        if place := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", row):
            file, line = files.get(int(place.group(1)), ""), int(place.group(2))
        elif op := re.match(r"\s+(?:global|buffer)_(?:load|store)_(?:lds_)?(\w+)\s", row):
            accesses.append(Access(AMD_WIDTHS.get(op.group(1), 4), file, line))
    mfma = len(re.findall(r"^\s+v_mfma", text, re.M))
    return Facts(
        registers=_number(r"\.vgpr_count:\s+(\d+)", text),
        spills=_number(r"\.vgpr_spill_count:\s+(\d+)", text)
        + _number(r"\.sgpr_spill_count:\s+(\d+)", text),
        accesses=accesses,
        matrix_instructions={"mfma": mfma} if mfma else {},
        atomics=len(re.findall(r"^\s+(?:global|buffer)_atomic", text, re.M)),
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's output has no {pattern!r}: has its format changed?")
    return int(found.group(1))
