"""The row kernels compiled for five targets: no spills, 16-byte accesses whatever V is."""

import pytest

from lit_align_kernels.audit.compiled import TARGETS
from lit_align_kernels.token_logprobs import audit
from tests.kernels.compiled.checks import checked_streams, every_target


@every_target
def test_logits_move_in_wide_accesses_without_spills(target, launches):
    for case in launches(audit.compile_cases(target)):
        checked_streams(case, target)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_so_they_do_in_every_shape(target):
    for case in audit.compile_cases(target, audit.MORE_SHAPES):
        checked_streams(case, target)
