"""The Triton kernel in the interpreter: values, memory it may touch, bytes it moves."""

import math

import pytest
import torch

from lit_align_kernels import launch_tables
from lit_align_kernels.audit.interpreter import interpreted
from lit_align_kernels.audit.traffic import traffic
from lit_align_kernels.entries import Entries
from lit_align_kernels.masked_adamw import AdamWEntry, audit, kernel, masked_adamw_, reference
from tests.kernels.cases import KINDS, KINDS_3D, elements, entries_of, flat_order

SETTINGS = {"lr": 0.03, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.2}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [(kind, shape) for kind in KINDS for shape in ((252, 123), (5, 1100))]
CASES += [(kind, (3, 5, 7)) for kind in KINDS_3D] + [("rows", (9, 1040)), ("rows", (40, 64))]


@pytest.fixture(params=["bitmap", "list"])
def found_by(request, monkeypatch):
    """Elements by bitmap or by list, whichever is the shorter."""
    most = 2**40 if request.param == "bitmap" else 0
    monkeypatch.setattr(launch_tables, "MOST_POSITIONS_PER_ENTRY", most)
    monkeypatch.setattr(launch_tables, "MOST_WORDS_PER_ENTRY_OF_A_BLOCK", most)


def amid_nans(values, offset):
    """The same values, `offset` entries into a tensor of NaNs."""
    room = torch.full((values.numel() + offset + 9,), torch.nan, dtype=values.dtype)
    room[offset : offset + values.numel()] = values.reshape(-1)
    return room[offset : offset + values.numel()]


def example(kind, shape, weight=torch.bfloat16, grad=torch.float32, offset=0, seed=0, steps=3):
    """An entry in the middle of training; NaNs around everything that it may touch."""
    generator = torch.Generator().manual_seed(seed)

    def some(n):
        return torch.randn(n, generator=generator)

    entries = entries_of(kind, shape, seed)
    full = amid_nans(some(math.prod(shape)).to(weight), 16).view(shape)
    n = entries.numel
    return AdamWEntry(
        amid_nans(full.reshape(-1)[flat_order(entries)].float(), 16),
        amid_nans(some(n).to(grad), 16 + offset),
        amid_nans(some(n), 16),
        amid_nans(some(n).square(), 16),
        torch.tensor(float(steps)),
        full,
        entries,
    )


def room_of(tensor):
    """Everything in the tensor's storage."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


def in_fp64(entry, scale=1.0, **changed):
    """Master and moments after one step, in fp64, from the equation."""
    s = SETTINGS | changed
    m, v, p, g = (t.double() for t in (entry.exp_avg, entry.exp_avg_sq, entry.master, entry.grad))
    g, t = g * scale, float(entry.step) + 1
    m = s["beta1"] * m + (1 - s["beta1"]) * g
    v = s["beta2"] * v + (1 - s["beta2"]) * g * g
    root = (v / (1 - s["beta2"] ** t)).sqrt() + s["eps"]
    p = p * (1 - s["lr"] * s["weight_decay"]) - s["lr"] * m / (1 - s["beta1"] ** t) / root
    return {"exp_avg": m, "exp_avg_sq": v, "master": p}


def launch(batch, **options):
    with interpreted():
        kernel.launch(batch, **(SETTINGS | options))


def clone(entry):
    return example_like(entry, lambda t: t.clone())


def example_like(entry, change):
    tensors = (entry.master, entry.grad, entry.exp_avg, entry.exp_avg_sq, entry.step)
    weight = None if entry.weight is None else entry.weight.clone()
    return AdamWEntry(*map(change, tensors), weight, entry.entries)


def assert_within_budget(entry, exact, torch_entry):
    """No further from fp64 than the torch reference, and a little."""
    for name, true in exact.items():
        found, torch_found = getattr(entry, name), getattr(torch_entry, name)
        if found.numel():
            budget = 2 * (torch_found.double() - true).abs().max() + 2e-7 * true.abs().max()
            assert (found.double() - true).abs().max() <= budget, name


def assert_only_selected_entries_moved(entry, room_before):
    """The weight holds the masters where it is selected; all else is bitwise as it was."""
    expected = room_before.clone()
    inside = expected[16 : 16 + entry.weight.numel()]
    inside[flat_order(entry.entries)] = entry.master.to(entry.weight.dtype)
    assert same_bits(room_of(entry.weight), expected)


def same_bits(a, b):
    as_int = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.view(as_int), b.view(as_int))


def check_one_step(entry, **options):
    by_torch, exact = clone(entry), in_fp64(entry, float(options.get("grad_scale", 1.0)))
    reference.masked_adamw_([by_torch], **SETTINGS, **options)
    weight_before = room_of(entry.weight).clone()
    launch([entry], **options)
    assert_within_budget(entry, exact, by_torch)
    assert_only_selected_entries_moved(entry, weight_before)
    assert entry.step == by_torch.step
    for tensor in (entry.master, entry.exp_avg, entry.exp_avg_sq):
        room = room_of(tensor)
        assert room[:16].isnan().all() and room[16 + tensor.numel() :].isnan().all()


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_one_step_of_every_kind(kind, shape):
    check_one_step(example(kind, shape))


@pytest.mark.parametrize("shape", [(507, 123), (9, 7)])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("elements")])
def test_elements_by_bitmap_and_by_list(kind, shape, found_by):
    check_one_step(example(kind, shape, weight=torch.float16))


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 5, 7])
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16])
def test_gradients_that_start_anywhere_in_a_bucket(grad, offset):
    for kind, shape in (("rows", (30, 123)), ("elements", (9, 11)), ("all", (1, 4096))):
        check_one_step(example(kind, shape, grad=grad, offset=offset))


@pytest.mark.parametrize("weight", DTYPES)
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16])
def test_dtypes(weight, grad):
    scale = torch.tensor(0.37)
    check_one_step(example("elements", (252, 123), weight, grad), grad_scale=scale)


def test_states_that_are_not_aligned():
    entry = example("elements", (252, 123))
    entry.exp_avg = amid_nans(entry.exp_avg, 17)
    entry.master = amid_nans(entry.master, 19)
    exact, by_torch = in_fp64(entry), clone(entry)
    reference.masked_adamw_([by_torch], **SETTINGS)
    launch([entry])
    assert_within_budget(entry, exact, by_torch)


def test_positions_of_a_bitmap_with_long_gaps(monkeypatch):
    monkeypatch.setattr(kernel, "TILE", 16)  # many tiles to a block, most of them empty
    monkeypatch.setattr(launch_tables, "MOST_POSITIONS_PER_ENTRY", 2**40)
    monkeypatch.setattr(launch_tables, "MOST_WORDS_PER_ENTRY_OF_A_BLOCK", 2**40)
    n = 200_000
    ends = [0, 31, 32, 33, *range(20_000, 20_600), *range(150_000, 151_000, 3), n - 33, n - 1]
    entry = example("elements", (400, 500))
    entry.entries = elements((400, 500), torch.tensor(ends))
    for name in ("master", "grad", "exp_avg", "exp_avg_sq"):
        setattr(entry, name, amid_nans(getattr(entry, name)[: len(ends)].clone(), 16))
    check_one_step(entry)


def test_positions_past_what_int32_holds(monkeypatch):
    # No such weight fits here: the same programs, told to compute positions in int64.
    place = launch_tables.place

    def in_int64(*args):
        (kind, _, even), row = place(*args)
        return (kind, torch.int64, even), row

    monkeypatch.setattr(launch_tables, "place", in_int64)
    check_one_step(example("elements", (252, 123)))


def test_wide_accesses_are_promised_only_where_addresses_and_rows_allow_them():
    # The interpreter ignores such promises, a GPU faults where they are broken.
    def even(kind, shape, offset=0):
        weight = amid_nans(torch.zeros(math.prod(shape)).bfloat16(), 16 + offset).view(shape)
        entries = entries_of(kind, shape)
        return launch_tables.place(weight, entries, entries.numel, 1024)[0]

    assert even("rows", (40, 64)) == ("short_rows", torch.int64, True)
    assert even("rows", (9, 1040)) == ("rows", torch.int64, True)
    assert not even("rows", (40, 72))[2] and not even("rows", (9, 1032))[2]
    assert not even("rows", (40, 64), 1)[2] and not even("columns", (64, 64))[2]
    assert even("all", (9, 7))[2] and not even("all", (9, 7), 3)[2]
    entries = entries_of("elements, one", (40, 64))
    assert launch_tables.place(torch.zeros(40, 64), entries, 1, 1024)[0][::2] == ("index", True)
    entries.positions = torch.zeros(2, dtype=torch.int32)[1:]
    assert launch_tables.place(torch.zeros(40, 64), entries, 1, 1024)[0][::2] == ("index", False)


def test_clustered_elements_are_found_by_a_list():
    # By bitmap, the program with the entries on both sides of the gap would walk through it alone.
    entries = audit.example_entries()["elements in two clusters"]
    weight = torch.zeros(entries.shape)
    assert math.prod(entries.shape) < 16 * entries.numel
    assert launch_tables.longest_span(entries, 1024) > 207 * 1009 // 32
    assert launch_tables.place(weight, entries, entries.numel, 1024)[0][0] == "index"
    even = elements((257, 1009), torch.arange(0, 257 * 1009, 11))
    assert launch_tables.longest_span(even, 1024) < 360
    assert launch_tables.place(weight, even, even.numel, 1024)[0][0] == "bitmap"


def test_many_parameters_in_one_launch_step_on_their_own():
    shapes = [(252, 123), (5, 7), (64, 100), (3, 1500)]
    batch = [example("elements", s, seed=i, steps=10 * i) for i, s in enumerate(shapes)]
    batch.append(example("elements, none", (4, 4)))
    alone = [clone(entry) for entry in batch]
    with interpreted(), traffic(rooms(batch)) as seen:
        kernel.launch(batch, **SETTINGS)
    assert len(seen.launches) == 1
    for entry, other in zip(batch, alone, strict=True):
        launch([other])
        assert torch.equal(entry.master, other.master) and entry.step == other.step
        assert same_bits(entry.weight, other.weight)


def as_many_launches(batch):
    with interpreted(), traffic(rooms(batch)) as seen:
        kernel.launch(batch, **SETTINGS)
    assert seen.races == seen.out_of_bounds == 0
    return len(seen.launches)


@pytest.mark.parametrize("shape", [(30, 123), (9, 1040)])
def test_rows_that_repeat(shape):
    """The same rows of several parameters in one launch; rows that two param groups share."""
    entries = entries_of("rows", shape)
    batch = [example("rows", shape, seed=i) for i in range(3)]
    for entry in batch:  # one object or equal ones, the same tensor of rows
        entry.entries = entries
    by_torch, before = [clone(entry) for entry in batch], [room_of(e.weight).clone() for e in batch]
    assert as_many_launches(batch) == 1
    reference.masked_adamw_(by_torch, **SETTINGS)
    for entry, other, room in zip(batch, by_torch, before, strict=True):
        torch.testing.assert_close(entry.master, other.master, rtol=1e-6, atol=1e-6)
        assert_only_selected_entries_moved(entry, room)
    # The second group's rows overlap the first's in one weight: the later launch decides.
    weight, rows = batch[0].weight, entries.rows
    second = example("rows", shape, seed=7)
    second.weight, second.entries = weight, Entries("rows", shape, rows=rows[1:].clone())
    for name in ("master", "grad", "exp_avg", "exp_avg_sq"):
        setattr(second, name, getattr(second, name)[shape[1] :].clone())
    launch([batch[0]])
    launch([second])
    view = weight.view(shape)
    assert torch.equal(view[rows[0]], batch[0].master[: shape[1]].bfloat16())
    assert torch.equal(view[rows[1:]].reshape(-1), second.master.bfloat16())


def rooms(batch):
    found = {}
    for i, entry in enumerate(batch):
        for name in ("master", "grad", "exp_avg", "exp_avg_sq", "step", "weight"):
            found[f"{name} {i}"] = getattr(entry, name)
        entries = entry.entries
        if entries.kind == "rows":
            found[f"rows {i}"] = entries.rows
        if entries.kind == "elements" and entries.numel:
            found[f"bitmap {i}"] = entries.bitmap()
            found[f"spans {i}"] = launch_tables.spans(entries, launch_tables.block_entries())
    return found


def test_steps_follow_torch_adamw_with_every_entry_selected():
    weight = torch.randn(57, 41)
    dense = torch.nn.Parameter(weight.clone())
    betas = (SETTINGS["beta1"], SETTINGS["beta2"])
    rest = {name: SETTINGS[name] for name in ("lr", "eps", "weight_decay")}
    optimizer = torch.optim.AdamW([dense], betas=betas, foreach=False, fused=False, **rest)
    entries = entries_of("elements, every", (57, 41))
    zeros = torch.zeros(57 * 41)
    ours = AdamWEntry(
        weight.reshape(-1).clone(), zeros, zeros.clone(), zeros.clone(), torch.zeros(()), weight,
        entries,
    )  # fmt: skip
    for _ in range(4):
        dense.grad = torch.randn(57, 41)
        ours.grad = dense.grad.reshape(-1)
        optimizer.step()
        launch([ours])
    torch.testing.assert_close(ours.master, dense.detach().reshape(-1), rtol=1e-6, atol=1e-6)
    assert torch.equal(weight.reshape(-1), ours.master)
    assert ours.step == 4


@pytest.mark.parametrize("shape", [(), (1,), (9,), (3, 5, 7), (1, 2100)])
def test_whole_parameters_without_a_weight(shape):
    master = torch.randn(shape)
    states = torch.randn(shape), torch.rand(shape)
    entry = AdamWEntry(master, torch.randn(shape), *states, torch.zeros(()))
    by_torch = clone(entry)
    launch([entry])
    reference.masked_adamw_([by_torch], **SETTINGS)
    torch.testing.assert_close(entry.master, by_torch.master, rtol=1e-6, atol=1e-6)


def test_layouts_of_gradient_and_master_may_differ():
    master, grad = torch.randn(5, 7), torch.randn(5, 7)
    zeros = torch.zeros(5, 7)
    plain = AdamWEntry(master.clone(), grad, zeros.clone(), zeros.clone(), torch.zeros(()))
    turned = example_like(plain, lambda t: t.t().contiguous().t() if t.ndim else t.clone())
    turned.grad = grad
    launch([plain])
    launch([turned])
    assert torch.equal(plain.master, turned.master)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the branch not taken
@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 0.999999])
@pytest.mark.parametrize("steps", [0, 1, 9, 499, 99_999])
def test_bias_corrections_are_precise(beta, steps):
    one = torch.ones(1)
    entry = AdamWEntry(one.clone(), one, 0 * one, 0 * one, torch.tensor(float(steps)))
    launch([entry], beta1=beta, beta2=0.0, eps=0.0, lr=1.0, weight_decay=0.0)
    exact = 1 - (1 - beta) / -math.expm1((steps + 1) * math.log(beta)) if beta else 0.0
    moved = 1 - entry.master.double().item()
    assert abs(moved - (1 - exact)) <= 2e-7 + 1e-6 * (1 - exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_the_reference_s(dtype):
    def batch():
        found = [example(kind, (252, 123), dtype) for kind in ("elements", "rows", "all")]
        for entry in found:
            entry.master = entry.master.to(dtype)
            entry.exp_avg = entry.exp_avg * 0
            entry.exp_avg_sq = entry.exp_avg_sq * 0
        return found

    ours, by_torch = batch(), batch()
    settings = SETTINGS | {"lr": 1e-4, "weight_decay": 0.0}
    with interpreted():
        kernel.launch(ours, **settings, stochastic_rounding_seed=-5)
    reference.masked_adamw_(by_torch, **settings, stochastic_rounding_seed=-5)
    before = batch()
    for entry, other, old in zip(ours, by_torch, before, strict=True):
        # fp32 sums may differ in their last bit, which shows in few of the rounded values.
        assert (entry.master != other.master).float().mean() < 1e-3
        assert (entry.master != old.master).any()
        selected = entry.weight.reshape(-1)[flat_order(entry.entries)]
        assert torch.equal(selected, entry.master)


def test_small_updates_add_up_where_they_are_rounded_at_random():
    n, lr = 4099, 1e-3 / 8
    master = torch.ones(n, dtype=torch.bfloat16)
    zeros = torch.zeros(n)
    entry = AdamWEntry(master, torch.ones(n), zeros, zeros.clone(), torch.zeros(()))
    for seed in range(8):  # below 1, bf16 has steps of 2⁻⁸
        launch([entry], lr=lr, weight_decay=0.0, stochastic_rounding_seed=seed)
    lost = 1 - master.double().mean().item()
    assert abs(lost - 8 * lr) < 4 * math.sqrt(8 * lr * 2**-8 / n)


def test_results_do_not_depend_on_the_blocks(monkeypatch):
    results = []
    for block in (64, 1024):
        monkeypatch.setattr(launch_tables, "block_entries", lambda target=None, b=block: b)
        entry = example("elements", (120, 123), torch.bfloat16)
        entry.master = entry.master.bfloat16()
        launch([entry], stochastic_rounding_seed=1)
        results.append(entry)
    assert same_bits(results[0].master, results[1].master)
    assert same_bits(results[0].weight, results[1].weight)


def test_the_public_function_launches_the_kernel(monkeypatch):
    monkeypatch.setenv("LIT_ALIGN_KERNELS", "triton")
    monkeypatch.setattr("lit_align_kernels.dispatch.TRITON_OPERATIONS", {"masked_adamw"})
    batch = [example("elements", (20, 30))]
    with interpreted(), traffic(rooms(batch)) as seen:
        masked_adamw_(batch, **SETTINGS)
        masked_adamw_([], **SETTINGS)
    assert [launch.kernel for launch in seen.launches] == ["masked_adamw_kernel"]


@pytest.mark.parametrize("case", audit.traffic_cases(), ids=lambda case: case.name)
def test_bytes_moved(case):
    with interpreted(), traffic(case.tensors) as seen:
        case.call()
    assert seen.races == seen.out_of_bounds == 0
    assert case.minimum_bytes <= seen.moved <= 1.01 * case.minimum_bytes
    assert seen.by_tensor()["weight"].stored == case.tensors["master"].numel() * 2
