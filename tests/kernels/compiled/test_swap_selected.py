"""The Triton kernel compiled for GPUs that are not here."""

import pytest

from lit_align_kernels.audit.compiled import TARGETS
from lit_align_kernels.swap_selected import audit
from tests.kernels.compiled.checks import checked_streams, every_target


def is_variation(case):
    return any(part in case.name for part in ("float32", "odd length", "masters"))


@every_target
def test_16_bit_weights(target, launches):
    cases = [case for case in audit.compile_cases(target) if not is_variation(case)]
    assert len(cases) == 5
    for case in launches(cases):
        checked_streams(case, target)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_other_weights(target):
    for case in audit.compile_cases(target):
        if is_variation(case):
            checked_streams(case, target)
