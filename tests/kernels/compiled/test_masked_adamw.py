"""The Triton kernel compiled for GPUs that are not here."""

import pytest

from lit_align_kernels.audit.compiled import TARGETS, compile_audit
from lit_align_kernels.masked_adamw import audit

# Their registers and accesses hardly differ from those of the others.
VARIATIONS = ("past 2**31", "odd length", "whole, fp16", "fp16 rounded")


def check(case, target):
    report = compile_audit(case, target)
    place = f"{case.name} {target}: {report}"
    assert report.spills == 0 and report.fits and report.atomics == 0, place
    assert report.wide_share("stream") >= 0.8, place
    assert "untagged" not in report.accesses, place
    if case.constexprs["EVEN"] and case.constexprs["KIND"] != "index":
        # Runs of 16 entries lie together in the weight (which there is not always).
        assert report.wide_share("scattered") > 0.5, place


def is_variation(case):
    return any(name in case.name for name in VARIATIONS)


@pytest.mark.parametrize("target", TARGETS)
def test_launches_of_training(target):
    cases = [case for case in audit.compile_cases(target) if not is_variation(case)]
    assert len(cases) >= 6
    for case in cases:
        check(case, target)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_their_variations(target):
    for case in audit.compile_cases(target):
        if is_variation(case):
            check(case, target)
