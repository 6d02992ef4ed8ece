"""The Triton kernel compiled for GPUs that are not here."""

import pytest

from lit_align_kernels.audit.compiled import TARGETS
from lit_align_kernels.masked_adamw import audit
from tests.kernels.compiled.checks import checked_streams, every_target

# Every kind of entries, and every alignment of the gradient in both of its dtypes.
OF_TRAINING = (
    "bitmap",
    "list, int64, bf16 gradient in a bucket",
    "rows",
    "short rows",
    "whole, no weight, gradient in a bucket",
)


def check(case, target):
    report = checked_streams(case, target)
    if case.constexprs["EVEN"] and case.constexprs["KIND"] != "index":
        # Runs of 16 entries lie together in the weight (which there is not always).
        assert report.wide_share("scattered") > 0.5, f"{case.name} {target}: {report}"


@every_target
def test_launches_of_training(target, launches):
    cases = [case for case in audit.compile_cases(target) if case.name in OF_TRAINING]
    assert len(cases) == len(OF_TRAINING)
    for case in launches(cases):
        check(case, target)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_their_variations(target):
    for case in audit.compile_cases(target):
        if case.name not in OF_TRAINING:
            check(case, target)
