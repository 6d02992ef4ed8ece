import dataclasses

import pytest
import torch

from lit_align_kernels import benchmarks
from lit_align_kernels.benchmarks import liger, masked_adamw, weighted_preference_loss
from lit_align_kernels.benchmarks.case import OURS, BenchmarkCase
from lit_align_kernels.benchmarks.masks import random_elements, random_rows
from lit_align_kernels.benchmarks.timing import peak_extra_bytes, times_ms
from lit_align_kernels.masked_adamw import masked_adamw_
from lit_align_kernels.swap_selected import scatter_entries_

CPU = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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


def with_ours(case, run):
    return dataclasses.replace(case, implementations={**case.implementations, OURS: run})


@pytest.mark.parametrize("operation", benchmarks.OPERATIONS)
def test_every_case_is_right_and_timed(operation):
    cases = benchmarks.cases(operation, "tiny", CPU)
    assert cases
    for case in cases:
        found, left_out = benchmarks.measure(case, CPU, CEILINGS, "tiny")
        assert not left_out
        assert [m.implementation for m in found] == list(case.implementations)
        assert {m.ratio for m in found if m.implementation == case.baseline} == {1.0}
        for m in found:
            assert m.median_ms > 0 and m.share_of_ceiling > 0 and m.peak_extra_mib >= 0
            assert (m.gb_per_s is None) != (case.minimum_bytes is not None)
            assert (m.tflops is None) != (case.flops is not None)


@DTYPES
@pytest.mark.parametrize("operation", benchmarks.OPERATIONS)
def test_everyone_is_right_in_what_a_gpu_times(operation, dtype):
    for case in benchmarks.cases(operation, "tiny", CPU, dtype):
        assert case.check() == {}


HEADS = ("token_logprobs", "weighted_preference_loss", "masked_weight_grad")


@DTYPES
@pytest.mark.parametrize("factor", [0.3, 0.99, 1.01, 1.05, -1.0])
@pytest.mark.parametrize("operation", HEADS)
def test_every_result_that_is_scaled_is_refused(operation, factor, dtype):
    for case in benchmarks.cases(operation, "tiny", CPU, dtype):
        right = case.implementations[OURS]
        for spoilt in range(len(right(case.make(0)))):

            def wrong(inputs, right=right, spoilt=spoilt):
                return [t * (factor if i == spoilt else 1) for i, t in enumerate(right(inputs))]

            with pytest.raises(benchmarks.CheckFailedError, match=f"{operation}.*result {spoilt} "):
                with_ours(case, wrong).check()


@DTYPES
@pytest.mark.parametrize("operation", HEADS)
def test_noise_of_two_percent_and_one_wrong_entry_are_refused(operation, dtype):
    def noisy(t):
        return t * (1 + 0.02 * torch.randn(t.shape, dtype=torch.float32)).to(t.dtype)

    def one_wrong(t):
        t = t.clone()
        t.view(-1)[t.numel() // 2] += 0.1 * t.abs().max()
        return t

    for case in benchmarks.cases(operation, "tiny", CPU, dtype):
        right = case.implementations[OURS]
        for spoil in (noisy, one_wrong):

            def wrong(inputs, right=right, spoil=spoil):
                *others, last = right(inputs)
                return [*others, spoil(last)]

            with pytest.raises(benchmarks.CheckFailedError, match=operation):
                with_ours(case, wrong).check()


def scaled_change(field, factor):
    """The update of masters or moments (the weights follow) taken `factor` times."""

    def spoil(entry, old):
        new = getattr(entry, field)
        new.copy_(getattr(old, field) + factor * (new - getattr(old, field)))
        if field == "master":
            scatter_entries_(entry.weight, entry.entries, entry.master)

    return spoil


def stale_weight(entry, old):
    entry.weight.copy_(old.weight)


def another_weight(entry, old):
    unselected = torch.ones(entry.weight.numel(), dtype=torch.bool)
    unselected[_positions(entry.entries)] = False
    entry.weight.view(-1)[unselected.nonzero()[0]] *= 1.01


def _positions(entries):
    if entries.kind == "elements":
        return entries.positions
    columns = entries.shape[1]
    return (entries.rows[:, None] * columns + torch.arange(columns)).view(-1)


FIELDS = ("master", "exp_avg", "exp_avg_sq")
FACTORS = (0.0, 0.99, 1.01, 1.05, -1.0)
SPOILT_STEPS = {
    **{f"{field} x {f}": scaled_change(field, f) for field in FIELDS for f in FACTORS},
    "weights not written": stale_weight,
    "an unselected weight written": another_weight,
}


@DTYPES
@pytest.mark.parametrize("how", SPOILT_STEPS)
def test_a_wrong_step_is_refused(how, dtype):
    for case in benchmarks.cases("masked_adamw", "tiny", CPU, dtype):
        right = case.implementations[OURS]

        def wrong(inputs, case=case, right=right):
            old = case.make(0).batch  # what `inputs` held
            results = right(inputs)
            SPOILT_STEPS[how](inputs.batch[-1], old[-1])
            return results

        with pytest.raises(benchmarks.CheckFailedError, match="masked_adamw"):
            with_ours(case, wrong).check()


@pytest.mark.parametrize("setting", ["weight_decay", "beta1", "beta2", "eps", "grad_scale"])
def test_a_step_with_another_setting_is_refused(setting):
    for case in benchmarks.cases("masked_adamw", "tiny", CPU):

        def wrong(inputs):
            settings = {**masked_adamw.SETTINGS, "grad_scale": inputs.scale}
            masked_adamw_(inputs.batch, **settings | {setting: 0.9 * settings[setting]})
            return []

        with pytest.raises(benchmarks.CheckFailedError, match="masked_adamw"):
            with_ours(case, wrong).check()


@DTYPES
def test_an_exchange_that_is_left_out_or_one_sided_is_refused(dtype):
    def nothing(swaps):
        return [t for weight, _, values in swaps for t in (weight, values)]

    def one_sided(swaps):
        for weight, entries, values in swaps:
            scatter_entries_(weight, entries, values)
        return nothing(swaps)

    for case in benchmarks.cases("swap_selected", "tiny", CPU, dtype):
        for wrong in (nothing, one_sided):
            with pytest.raises(benchmarks.CheckFailedError, match="swap_selected"):
                with_ours(case, wrong).check()


def test_a_kernel_that_fails_its_check_is_not_timed():
    calls = []
    case = doubling(lambda x: [2 * x + (torch.arange(1000) == 7)], calls)
    with pytest.raises(benchmarks.CheckFailedError, match=r"result 0 of lit-align is off by 1 .*"):
        benchmarks.measure(case, CPU, CEILINGS, "tiny")
    assert not calls


@pytest.mark.parametrize("wrong", [True, False])
def test_a_competitor_that_is_wrong_or_raises_is_left_out(wrong):
    calls = []

    def broken(x):
        calls.append(x)
        if not wrong:
            raise RuntimeError("no compiler\nand a long trace")
        return [1.9 * x]

    case = doubling(double, [])
    case = dataclasses.replace(case, implementations={**case.implementations, "broken": broken})
    found, (left_out,) = benchmarks.measure(case, CPU, CEILINGS, "tiny")
    assert [m.implementation for m in found] == [OURS, "other"]
    assert left_out.implementation == "broken" and len(calls) == 1
    expected = "CheckFailedError: doubling, on purpose: result 0 of broken is off"
    assert left_out.reason.startswith(expected if wrong else "RuntimeError: no compiler")
    assert "trace" not in left_out.reason


def test_without_its_baseline_a_case_has_no_ratios():
    case = dataclasses.replace(doubling(double, []), implementations={OURS: double, "other": abs})
    (ours,), (left_out,) = benchmarks.measure(case, CPU, CEILINGS, "tiny")
    assert ours.ratio is None and left_out.implementation == "other"


@DTYPES
def test_ligers_dpo_is_the_plain_one(dtype):
    pytest.importorskip("liger_kernel")

    def by_liger(inputs):
        beta, pairs = weighted_preference_loss.DPO_BETA, weighted_preference_loss.PAIRS
        args = (inputs.hidden, inputs.weight, inputs.targets, pairs, beta)
        return inputs.gradients(liger.fused_linear_dpo(*args, compiled=False))

    case = benchmarks.cases("weighted_preference_loss", "tiny", CPU, dtype)[2]
    assert with_ours(case, by_liger).check() == {}
    weighted = benchmarks.cases("weighted_preference_loss", "tiny", CPU, dtype)[1]
    with pytest.raises(benchmarks.CheckFailedError):
        with_ours(weighted, by_liger).check()


def test_nan_fails_the_check():
    with pytest.raises(benchmarks.CheckFailedError):
        doubling(lambda x: [x * torch.nan], []).check()


def test_figures_follow_from_the_median():
    (ours, other), _ = benchmarks.measure(doubling(double, []), CPU, CEILINGS, "tiny")
    assert ours.gb_per_s == pytest.approx(8000 / ours.median_ms / 1e6)
    assert ours.share_of_ceiling == pytest.approx(ours.gb_per_s / 10.0)
    assert ours.ratio == pytest.approx(ours.median_ms / other.median_ms)


def test_functions_take_turns_on_inputs_that_rotate():
    seen = []
    functions = {name: lambda x, name=name: seen.append((name, x)) for name in "ab"}
    timed = times_ms(functions, [0, 1], CPU, rounds=3, warm_up=1)
    assert seen == [(name, i % 2) for i in range(5) for name in "ab"]
    assert [len(v) for v in timed.values()] == [3, 3]


def test_the_warm_up_meets_every_input():
    seen = []
    times_ms({"a": seen.append}, [0, 1, 2, 3], CPU, rounds=2, warm_up=3)
    assert sorted(seen[:-2]) == [0, 1, 2, 3]


def test_peak_memory_leaves_out_what_is_returned():
    def work(x):
        large = x.repeat(4)
        return [large[:10].clone(), (x + 1)]

    x = torch.ones(1 << 18)
    peak = peak_extra_bytes(work, x, CPU)
    assert 4 * x.nbytes <= peak <= 4 * x.nbytes + 4096


def test_results_in_place_and_views_of_one_storage_are_not_subtracted_twice():
    def work(inputs):
        (x,) = inputs["x"]
        x.add_(x.repeat(4)[: x.numel()])
        new = x.repeat(2)
        return [x, x[:5], new[:3], new[3:]]

    x = torch.ones(1 << 18)
    peak = peak_extra_bytes(work, {"x": [x]}, CPU)
    assert 2 * x.nbytes <= peak <= 4 * x.nbytes + 4096  # `repeat(4)` is gone before `new`
    case = benchmarks.cases("masked_adamw", "tiny", CPU)[0]
    assert peak_extra_bytes(case.implementations[OURS], case.make(0), CPU) > 0


def test_masks_have_the_share_that_was_asked():
    entries = random_elements((500, 200), 0.1, CPU)
    assert abs(entries.numel / 100_000 - 0.1) < 0.01
    assert entries.row_offsets[-1] == entries.numel
    rows = random_rows((640, 4), 0.1, CPU, run=64).rows
    assert rows.numel() == 64 and (rows.diff() == 1).all() and rows[0] % 64 == 0


def test_an_unknown_kernel_is_an_error():
    with pytest.raises(ValueError, match="no kernel 'adam'"):
        benchmarks.cases("adam", "tiny", CPU)
