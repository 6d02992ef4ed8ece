"""What every kernel that streams contiguous data is held to, and for which targets."""

import pytest

from lit_align_kernels.audit.compiled import TARGETS, compile_audit

# `make test` compiles every launch for these two; for each of the others every third one, another
# one on each, so that a launch is compiled for three targets. The rest are slow proofs.
WHOLE_TARGETS = ("sm_90", "gfx942")
OTHER_TARGETS = tuple(target for target in TARGETS if target not in WHOLE_TARGETS)
SLOW = (pytest.mark.long, pytest.mark.old_triton)


def every_target(test):
    """Give a test (target, launches): the latter chooses among the cases of a kernel."""
    short = [
        *(pytest.param(target, list, id=target) for target in WHOLE_TARGETS),
        *(
            pytest.param(target, lambda cases, i=i: cases[i :: len(OTHER_TARGETS)], id=target)
            for i, target in enumerate(OTHER_TARGETS)
        ),
    ]
    slow = [pytest.param(t, list, id=f"{t}-every", marks=SLOW) for t in OTHER_TARGETS]
    return pytest.mark.parametrize(("target", "launches"), short + slow)(test)


def checked_streams(case, target):
    """The report of a case: no spill, no atomic, every access sorted, 80 % of the stream wide."""
    report = compile_audit(case, target)
    place = f"{report.kernel} {case.name} {target}: {report}"
    assert report.spills == 0 and report.fits and report.atomics == 0, place
    assert report.accesses["stream"] and "untagged" not in report.accesses, place
    assert report.wide_share("stream") >= 0.8, place
    return report
