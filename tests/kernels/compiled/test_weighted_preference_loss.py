"""The NPO row kernel compiled for five targets: no spills, 16-byte accesses whatever V is."""

import pytest

from lit_align_kernels.audit.compiled import TARGETS, compile_audit
from lit_align_kernels.token_logprobs.audit import MORE_SHAPES
from lit_align_kernels.weighted_preference_loss import audit


def check(case, target):
    report = compile_audit(case, target)
    place = f"{report.kernel} {case.name} {target}: {report.accesses}"
    assert report.spills == 0, place
    assert report.fits and report.atomics == 0, place
    assert report.accesses["stream"] and "untagged" not in report.accesses, place
    assert report.wide_share("stream") >= 0.8, place


@pytest.mark.parametrize("target", TARGETS)
def test_logits_move_in_wide_accesses_without_spills(target):
    for case in audit.compile_cases(target):
        check(case, target)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_so_they_do_in_every_shape(target):
    for case in audit.compile_cases(target, MORE_SHAPES):
        check(case, target)
