"""`aᵀb` at the selected entries; a tile without one is not computed.

*Moved* is above the minimum because every tile reads its rows and columns of the factors again (a
cache's work); entries are written once. Narrow stream accesses are fp32 results of an odd width,
and fp32 factors where they are transposed on their way to the matrix unit. Rows that stand in no
run of 16 are packed by torch's `index_select` before: *by torch* counts the sectors that it reads
and the bytes that it writes.
"""

from __future__ import annotations

import torch

from lit_align_kernels.audit.compiled import CompileCase
from lit_align_kernels.audit.traffic import TrafficCase
from lit_align_kernels.entries import Entries
from lit_align_kernels.masked_weight_grad import kernel
from lit_align_kernels.masked_weight_grad.tiles import RUN, TILINGS, Arithmetic, Tiling, plan

MASKS = ("all", "runs of rows", "elements")
SECTOR_BYTES = 32
TYPES: dict[Arithmetic, str] = {"half": "bf16", "tf32": "fp32", "ieee": "fp32"}
FP32: tuple[Arithmetic, ...] = ("tf32", "ieee")


def compile_cases(target: str, every: bool = False) -> list[CompileCase]:
    """The launches that training meets; with `every`, all that the host code can make.

    Both factors always reach the kernel with rows at multiples of 16 bytes. What differs is whether
    Q divides by 16 (then no bitmap word spans two rows) and whether places need int64. fp32 factors
    are multiplied in fp32 or in TF32 as `torch.set_float32_matmul_precision` says.
    """
    tilings = TILINGS[target]
    if every:
        fp16 = [
            _case("half", tiling, "elements", accumulate=True, divisible=True, dtype="fp16")
            for tiling in tilings["half"]
        ]
        return fp16 + [
            _case(work, tiling, mask, accumulate, divisible, wide=not divisible)
            for work, choices in tilings.items()
            for tiling in choices
            for mask in MASKS
            for accumulate in (False, True)
            for divisible in (True, False)
        ]
    large, medium, small = tilings["half"]
    return [
        _case("half", large, "elements", accumulate=False, divisible=True),
        _case("half", large, "elements", accumulate=True, divisible=False, wide=True),
        _case("half", large, "runs of rows", accumulate=False, divisible=True),
        _case("half", large, "all", accumulate=True, divisible=False),
        _case("half", medium, "elements", accumulate=True, divisible=True),
        _case("half", small, "elements", accumulate=False, divisible=True),
        *(
            _case(work, tilings[work][0], "elements", accumulate=False, divisible=True)
            for work in FP32
        ),
    ]


def _case(
    work: Arithmetic,
    tiling: Tiling,
    mask: str,
    accumulate: bool,
    divisible: bool,
    wide: bool = False,
    dtype: str | None = None,
) -> CompileCase:
    dtype = dtype or TYPES[work]
    shape = f"{tiling.rows}x{tiling.columns}"
    words = [dtype, work, shape, mask]
    words += ["added" if accumulate else "written", "Q = 16 n" if divisible else "odd Q"]
    pointer, number = f"*{dtype}", "i32:16" if divisible else "i32"
    place = "i64" if wide else "i32"
    return CompileCase(
        name=", ".join([*words, "int64"] if wide else words),
        kernel=kernel.masked_product_kernel,
        signature={
            "a_ptr": pointer, "b_ptr": pointer, "out_ptr": "*fp32", "tiles_ptr": "*i32",
            "runs_ptr": "*i32", "starts_ptr": f"*{place}", "bitmap_ptr": "*i32", "N": "i32",
            "P": "i32", "Q": number, "a_stride": "i32", "b_stride": "i32", "a_length": "i32",
            "b_length": "i32", "bitmap_words": "i32",
        },
        constexprs={
            "RUNS": RUN if mask == "runs of rows" else 0, "ELEMENTS": mask == "elements",
            "WHOLE_WORDS": divisible, "ACCUMULATE": accumulate,
            "PRECISION": "tf32" if work == "tf32" else "ieee", "ROWS": tiling.rows,
            "COLUMNS": tiling.columns, "TOKENS": tiling.tokens,
        },
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )  # fmt: skip


def traffic_cases() -> list[TrafficCase]:
    """A tenth of the elements, heads, and blocks of a (256, 384) weight; 192 tokens in bf16.

    Minimum: the factors' columns that are needed once, the bitmap once, each selected entry once.
    What is moved above it are factors that several tiles read: L2's work on a GPU.
    """
    return [_traffic_case(name, entries) for name, entries in _masks((256, 384)).items()]


def _masks(shape: tuple[int, int]) -> dict[str, Entries]:
    generator = torch.Generator().manual_seed(0)
    scattered = torch.rand(shape, generator=generator) < 0.1
    blocks = torch.zeros(shape, dtype=torch.bool)
    for row, column in ((0, 0), (32, 64), (64, 320), (192, 128), (224, 352)):
        blocks[row : row + 32, column : column + 32] = True
    head = torch.arange(64, 128)
    return {
        "10 % of elements": _elements(scattered),
        "10 % of rows": Entries("rows", shape, rows=torch.arange(3, shape[0], 10)),
        "a head of 64 rows": Entries("rows", shape, rows=head),
        "5 blocks of 32 x 32": _elements(blocks),
    }


def _elements(chosen: torch.Tensor) -> Entries:
    counts = chosen.sum(1)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    positions = chosen.reshape(-1).nonzero()[:, 0].int()
    return Entries("elements", tuple(chosen.shape), positions=positions, row_offsets=offsets)


def _traffic_case(name: str, entries: Entries, tokens: int = 192) -> TrafficCase:
    rows, columns = entries.shape
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(tokens, rows, generator=generator).bfloat16()
    b = torch.randn(tokens, columns, generator=generator).bfloat16()
    out = torch.full((entries.numel,), torch.nan)
    if entries.kind == "elements":
        assert entries.positions is not None
        needed = tokens * sum(
            index.unique().numel()
            for index in (entries.positions // columns, entries.positions % columns)
        )
        bitmap = rows * columns // 8
    else:
        assert entries.rows is not None
        needed, bitmap = tokens * (entries.rows.numel() + columns), 0
    return TrafficCase(
        name=name,
        call=lambda: kernel.masked_weight_grad(a, b, entries, out, accumulate=False),
        minimum_bytes=2 * needed + bitmap + 4 * entries.numel,
        extra_bytes=_bytes_of_packing(a, entries),
    )


def _bytes_of_packing(a: torch.Tensor, entries: Entries) -> int:
    """What `index_select` reads of `a`, in sectors, and writes; 0 where it is not called."""
    half = TILINGS[kernel.target_of(a.device)]["half"]
    packed = plan(entries, half, 1, a.device).packed
    if packed is None:
        return 0
    assert a.is_contiguous() and a[0].nbytes % SECTOR_BYTES == 0  # each row is whole sectors
    sectors = (packed * a.element_size() // SECTOR_BYTES).unique().numel()
    return a.shape[0] * (sectors * SECTOR_BYTES + packed.numel() * a.element_size())
