"""The Triton kernel compiled for GPUs that are not here."""

import pytest

from lit_align_kernels.audit.compiled import TARGETS, compile_audit
from lit_align_kernels.masked_weight_grad import audit
from lit_align_kernels.masked_weight_grad.tiles import TILINGS
from tests.kernels.compiled.checks import SLOW, WHOLE_TARGETS

MATRIX_UNITS = {
    "sm_80": "mma",
    "sm_90": "wgmma",
    "sm_100": "tcgen05",
    "sm_120": "mma",
    "gfx942": "mfma",
}


def check(case, target):
    report = compile_audit(case, target)
    assert report.spills == 0
    assert report.fits
    assert report.atomics == 0
    assert "untagged" not in report.accesses
    if "ieee" not in case.name:
        assert set(report.matrix_instructions) == {MATRIX_UNITS[target]}
    # The factors of 16 bits; fp32 ones are transposed on their way to wgmma and tcgen05, word by
    # word, and rows of an odd length are stored entry by entry.
    if case.signature["a_ptr"] in ("*bf16", "*fp16") and "odd Q" not in case.name:
        assert report.wide_share("stream") == 1.0
    scattered = report.accesses.get("scattered", {})
    assert bool(scattered) == case.constexprs["ELEMENTS"]


def tiling(case):
    shape = [case.constexprs[name] for name in ("ROWS", "COLUMNS", "TOKENS", "PRECISION")]
    return case.signature["a_ptr"], *shape, case.num_warps, case.num_stages


def test_every_target_has_tilings():
    assert set(TILINGS) == set(TARGETS)


# Every tiling on its target; the other launches of the largest one are slow proofs on some.
ONE_A_TILING = (1, 4, 5, 6, 7)


@pytest.mark.parametrize(
    ("target", "index"),
    [
        pytest.param(
            target, index, marks=() if target in WHOLE_TARGETS or index in ONE_A_TILING else SLOW
        )
        for target in TARGETS
        for index in range(8)
    ],
)
def test_launches_of_training(target, index):
    cases = audit.compile_cases(target)
    assert len(cases) == 8
    assert len({tiling(cases[i]) for i in ONE_A_TILING}) == len(ONE_A_TILING)
    check(cases[index], target)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_every_launch(target):
    for case in audit.compile_cases(target, every=True):
        check(case, target)
