"""The Triton kernel compiled for GPUs that are not here."""

import pytest

from lit_align_kernels.audit.compiled import TARGETS, compile_audit
from lit_align_kernels.swap_selected import audit


def check(case, target):
    report = compile_audit(case, target)
    place = f"{case.name} {target}: {report}"
    assert report.spills == 0 and report.fits and report.atomics == 0, place
    assert report.wide_share("stream") >= 0.8, place
    assert "untagged" not in report.accesses, place


def is_variation(case):
    return any(part in case.name for part in ("float32", "odd length", "masters"))


@pytest.mark.parametrize("target", TARGETS)
def test_16_bit_weights(target):
    cases = [case for case in audit.compile_cases(target) if not is_variation(case)]
    assert len(cases) == 5
    for case in cases:
        check(case, target)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_other_weights(target):
    for case in audit.compile_cases(target):
        if is_variation(case):
            check(case, target)
