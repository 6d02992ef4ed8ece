import dataclasses

import pytest
import torch

from lit_align_kernels import benchmarks
from lit_align_kernels.benchmarks.case import OURS, BenchmarkCase
from lit_align_kernels.benchmarks.masks import random_elements, random_rows
from lit_align_kernels.benchmarks.timing import peak_extra_bytes, times_ms

CPU = torch.device("cpu")
CEILINGS = benchmarks.Ceilings(copy_gb_per_s=10.0, matmul_tflops=0.1)


def double(x):
    return [2 * x]


def doubling(ours, calls):
    def counted(x):
        calls.append(x)
        return [x + x]

    return BenchmarkCase(
        operation="doubling",
        name="on purpose",
        make=lambda seed: torch.full((1000,), seed + 1.0),
        implementations={OURS: ours, "other": counted},
        expected=lambda x: [2 * x.double()],
        baseline="other",
        minimum_bytes=8000,
    )


@pytest.mark.parametrize("operation", benchmarks.OPERATIONS)
def test_every_case_is_right_and_timed(operation):
    cases = benchmarks.cases(operation, "tiny", CPU)
    assert cases
    for case in cases:
        found = benchmarks.measure(case, CPU, CEILINGS, "tiny")
        assert [m.implementation for m in found] == list(case.implementations)
        assert {m.ratio for m in found if m.implementation == case.baseline} == {1.0}
        for m in found:
            assert m.median_ms > 0 and m.share_of_ceiling > 0 and m.peak_extra_mib >= 0
            assert (m.gb_per_s is None) != (case.minimum_bytes is not None)
            assert (m.tflops is None) != (case.flops is not None)


@pytest.mark.parametrize("operation", benchmarks.OPERATIONS)
def test_a_wrong_result_is_found_in_every_case(operation):
    for case in benchmarks.cases(operation, "tiny", CPU):
        right = case.implementations[OURS]

        def wrong(inputs, right=right):
            results = [t.clone() for t in right(inputs)]
            results[-1].view(-1)[-1] += 0.01 + results[-1].abs().max()
            return results

        spoilt = dataclasses.replace(case, implementations={**case.implementations, OURS: wrong})
        with pytest.raises(benchmarks.CheckFailedError, match=operation):
            spoilt.check()


def test_a_kernel_that_fails_its_check_is_not_timed():
    calls = []
    case = doubling(lambda x: [2 * x + (torch.arange(1000) == 7)], calls)
    with pytest.raises(benchmarks.CheckFailedError, match=r"result 0 is off by 1, .*not.* timed"):
        benchmarks.measure(case, CPU, CEILINGS, "tiny")
    assert not calls


def test_nan_fails_the_check():
    with pytest.raises(benchmarks.CheckFailedError):
        doubling(lambda x: [x * torch.nan], []).check()


def test_figures_follow_from_the_median():
    ours, other = benchmarks.measure(doubling(double, []), CPU, CEILINGS, "tiny")
    assert ours.gb_per_s == pytest.approx(8000 / ours.median_ms / 1e6)
    assert ours.share_of_ceiling == pytest.approx(ours.gb_per_s / 10.0)
    assert ours.ratio == pytest.approx(ours.median_ms / other.median_ms)


def test_functions_take_turns_on_inputs_that_rotate():
    seen = []
    functions = {name: lambda x, name=name: seen.append((name, x)) for name in "ab"}
    timed = times_ms(functions, [0, 1], CPU, rounds=3, warm_up=1)
    assert seen == [(name, i % 2) for i in (1, 2, 3, 4) for name in "ab"]
    assert [len(v) for v in timed.values()] == [3, 3]


def test_peak_memory_leaves_out_what_is_returned():
    def work(x):
        large = x.repeat(4)
        return [large[:10].clone(), (x + 1)]

    x = torch.ones(1 << 18)
    peak = peak_extra_bytes(work, x, CPU)
    assert 4 * x.nbytes <= peak <= 4 * x.nbytes + 4096


def test_masks_have_the_share_that_was_asked():
    entries = random_elements((500, 200), 0.1, CPU)
    assert abs(entries.numel / 100_000 - 0.1) < 0.01
    assert entries.row_offsets[-1] == entries.numel
    rows = random_rows((640, 4), 0.1, CPU, run=64).rows
    assert rows.numel() == 64 and (rows.diff() == 1).all() and rows[0] % 64 == 0


def test_an_unknown_kernel_is_an_error():
    with pytest.raises(ValueError, match="no kernel 'adam'"):
        benchmarks.cases("adam", "tiny", CPU)
