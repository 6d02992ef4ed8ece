import itertools
import math

import pytest
import torch

from lit_align.errors import LocalizationError, MaskError
from lit_align.masks import PartialScores, conv1d_row_axes, parts, select, topk
from tests.tiny_models import tiny_model

SHAPES = {"emb.weight": (17, 5), "norm.weight": (9,), "experts": (3, 4, 6), "scale": ()}


def random_scores(dtype=torch.float32, *, ties=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    float64 = {"generator": generator, "dtype": torch.float64}
    scores = {name: torch.randn(shape, **float64) for name, shape in SHAPES.items()}
    if ties:
        scores = {n: (t * 2).round() / 2 for n, t in scores.items()}
    return {n: t.to(dtype) for n, t in scores.items()}


def brute_force(scores, k):
    """Global top-k by a stable sort of everything."""
    flat = torch.cat([t.reshape(-1).double() for t in scores.values()])
    flags = torch.zeros(flat.numel(), dtype=torch.bool)
    flags[torch.sort(flat, descending=True, stable=True).indices[:k]] = True
    parts = flags.split([t.numel() for t in scores.values()])
    return {n: p.reshape(t.shape) for p, (n, t) in zip(parts, scores.items(), strict=True)}


def assert_same(mask, expected):
    assert list(mask.selections) == list(expected)
    for name, flags in expected.items():
        assert torch.equal(mask.dense(name), flags), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("ratio", [0.001, 0.05, 0.1, 0.5, 0.97, 1.0])
def test_global_equals_brute_force(dtype, ties, ratio):
    scores = random_scores(dtype, ties=ties)
    total = sum(t.numel() for t in scores.values())
    mask = select(scores, ratio)
    k = max(1, round(ratio * total))
    assert mask.count() == k
    assert_same(mask, brute_force(scores, k))


def test_global_over_many_chunks_equals_brute_force(monkeypatch):
    monkeypatch.setattr(parts, "PART", 8)
    scores = random_scores(ties=True)
    assert_same(select(scores, 0.3), brute_force(scores, round(0.3 * 167)))


@pytest.mark.parametrize("most", [0, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ties", [False, True])
def test_a_bin_that_holds_too_much_is_divided(ties, dtype, most, monkeypatch):
    monkeypatch.setattr(topk, "MAX_KEPT", most)
    scores = random_scores(dtype, ties=ties)
    for ratio in (0.05, 0.3, 0.9):
        assert_same(select(scores, ratio), brute_force(scores, round(ratio * 167)))


@pytest.mark.parametrize("scope", ["global", "per_parameter"])
@pytest.mark.parametrize("granularity", ["element", "row"])
def test_partial_scores_are_never_read_whole(granularity, scope, monkeypatch):
    monkeypatch.setattr(parts, "PART", 8)
    monkeypatch.setattr("lit_align.masks.units.PART", 8)
    scores = random_scores(ties=True)

    class Parts(PartialScores):
        def shape(self, name):
            return SHAPES[name]

        def part(self, name, start, stop):
            assert stop - start <= 8
            return scores[name].reshape(-1)[start:stop]

        def __getitem__(self, name):
            raise AssertionError(f"{name} was read whole")

        def __iter__(self):
            return iter(SHAPES)

        def __len__(self):
            return len(SHAPES)

    expected = select(scores, 0.3, scope, granularity=granularity)
    found = select(Parts(), 0.3, scope, granularity=granularity)
    assert found == expected and found.metadata == expected.metadata


def test_mixed_precision_keys_are_as_wide_as_the_widest():
    scores = random_scores()
    scores["experts"] = scores["experts"].double() + 1e-12
    assert_same(select(scores, 0.2), brute_force(scores, round(0.2 * 167)))


def test_neighbouring_fp64_scores_are_told_apart():
    a = torch.tensor([1.0, 1.0 + 2**-52, 1.0 + 2**-51], dtype=torch.float64)
    assert select({"a": a}, 0.34).dense("a").tolist() == [False, False, True]
    assert select({"a": a}, 0.67).dense("a").tolist() == [False, True, True]


def test_signed_zeros_infinities_and_denormals_are_ordered_as_floats():
    a = torch.tensor([-0.0, 0.0, 1e-45, -1e-45, math.inf, -math.inf, -2.0])
    order = [4, 2, 0, 1, 3, 6, 5]  # -0.0 equals 0.0 and stands first
    for k in range(1, 8):
        flags = select({"a": a}, k / 7).dense("a")
        assert set(flags.nonzero().flatten().tolist()) == set(order[:k])


def test_smaller_masks_are_nested_in_larger_ones():
    scores = random_scores(ties=True)
    for granularity in ("element", "row", "layer"):
        masks = [select(scores, r, granularity=granularity) for r in (0.05, 0.1, 0.3, 0.8)]
        for small, large in itertools.pairwise(masks):
            assert (small - large).count() == 0


def test_all_scores_equal_takes_the_first():
    scores = {"a": torch.ones(4), "b": torch.ones(2, 3)}
    mask = select(scores, 0.5)
    assert mask.dense("a").all() and mask.dense("b").tolist() == [[True, False, False], [False] * 3]
    assert mask.metadata.extra == {"threshold": 1.0, "ties_at_threshold": 10 / 5}


def test_ties_count_only_where_an_equal_was_left_out():
    a = torch.tensor([3.0, 2.0, 2.0, 1.0])
    assert select({"a": a}, 0.5).metadata.extra["ties_at_threshold"] == 1.0
    assert select({"a": a}, 0.75).metadata.extra["ties_at_threshold"] == 0.0


def test_per_parameter_takes_the_ratio_of_each():
    scores = random_scores()
    mask = select(scores, 0.25, "per_parameter")
    for name, tensor in scores.items():
        k = max(1, round(0.25 * tensor.numel()))
        assert torch.equal(mask.dense(name), brute_force({name: tensor}, k)[name])
    lowest = mask.metadata.extra["threshold_parameter"]
    assert mask.metadata.extra["threshold"] == scores[lowest][mask.dense(lowest)].min()


def test_rows_are_ranked_by_their_mean():
    scores = {
        "a": torch.tensor([[1.0, 3.0], [0.0, 1.0], [5.0, 5.0]]),
        "conv": torch.tensor([[9.0, 0.0, 1.0], [9.0, 0.0, 2.0]]),
        "bias": torch.tensor([0.1, 4.0]),
        "experts": torch.arange(8.0).reshape(2, 2, 2) / 10,
    }
    mask = select(scores, 3 / 12, granularity="row", row_axes={"conv": 1})
    assert mask.dense("a").tolist() == [[False] * 2, [False] * 2, [True] * 2]
    assert mask.dense("conv").tolist() == [[True, False, False]] * 2
    assert mask.dense("bias").tolist() == [False, True]
    assert not mask.dense("experts").any()
    assert (mask.selections["conv"].kind, mask.selections["conv"].axis) == ("rows", 1)
    assert mask.metadata.granularity == "row" and mask.metadata.extra["threshold"] == 4.0


@pytest.mark.parametrize("axis", [0, 1])
def test_row_means_over_many_chunks(monkeypatch, axis):
    monkeypatch.setattr("lit_align.masks.units.PART", 16)
    a = torch.randn(11, 7)
    mask = select({"a": a}, 0.3, granularity="row", row_axes={"a": axis})
    means = a.double().mean(1 - axis)
    best = means.topk(math.ceil(0.3 * len(means))).indices.sort().values
    assert torch.equal(mask.selections["a"].rows, best)


def test_layers_are_whole_parameters():
    scores = {"a": torch.full((2, 2), 1.0), "b": torch.tensor([0.0, 3.0]), "c": torch.zeros(3)}
    mask = select(scores, 0.3, granularity="layer")  # one of three, the mean 1.5
    assert {n: s.kind for n, s in mask.selections.items()} == {"a": "none", "b": "all", "c": "none"}


def test_a_share_of_units_is_not_rounded_up_by_float_noise():
    rows = torch.arange(100.0).reshape(100, 1)  # 0.07 * 100 is 7.000000000000001
    assert select({"a": rows}, 0.07, granularity="row").count() == 7


def test_conv1d_columns_are_its_output_units():
    model = tiny_model("gpt2")
    axes = conv1d_row_axes(model)
    assert axes["transformer.h.0.attn.c_attn.weight"] == 1
    assert set(axes) <= {name for name, _ in model.named_parameters()}
    assert not any("wte" in name for name in axes)
    assert conv1d_row_axes(tiny_model("llama")) == {}


def test_metadata_says_how_the_mask_was_made():
    mask = select(
        random_scores(), 0.1, method="gradient", base_fingerprint="ab", extra={"batches": 4}
    )
    metadata = mask.metadata
    assert (metadata.method, metadata.granularity, metadata.ratio) == ("gradient", "element", 0.1)
    assert (metadata.scope, metadata.base_fingerprint) == ("global", "ab")
    assert metadata.extra["batches"] == 4 and metadata.realised_ratio == mask.density() == 17 / 167


def test_an_infinite_threshold_is_kept_as_text(tmp_path):
    mask = select({"a": torch.full((4,), math.inf)}, 0.5)
    assert mask.metadata.extra["threshold"] == "inf"
    mask.save(tmp_path / "mask.safetensors")


def test_scores_are_read_one_at_a_time_and_few_times():
    class Lazy(dict):
        reads = 0

        def __getitem__(self, name):
            self.reads += 1
            return super().__getitem__(name)

    lazy = Lazy(random_scores())
    assert select(lazy, 0.1) == select(random_scores(), 0.1)
    assert lazy.reads == 2 * len(SHAPES)


def test_scores_that_change_between_reads_are_refused():
    class Changing(dict):
        def __getitem__(self, name):
            return torch.rand(super().__getitem__(name).shape)

    with pytest.raises(LocalizationError, match="changed between two reads"):
        select(Changing(random_scores()), 0.5)


@pytest.mark.parametrize("granularity", ["element", "row", "layer"])
def test_nan_scores_name_the_tensor(granularity):
    scores = random_scores()
    scores["experts"][1, 2, 3] = math.nan
    with pytest.raises(LocalizationError, match=r"'experts'.*NaN"):
        select(scores, 0.1, granularity=granularity)


@pytest.mark.parametrize("granularity", ["element", "row"])
def test_integer_scores_are_refused(granularity):
    with pytest.raises(LocalizationError, match=r"'a'.*int64"):
        select({"a": torch.arange(4)}, 0.5, granularity=granularity)


@pytest.mark.parametrize("scores", [{}, {"a": torch.zeros(0, 3)}])
@pytest.mark.parametrize(
    ("granularity", "scope"),
    [
        ("element", "global"),
        ("element", "per_parameter"),
        ("row", "global"),
        ("row", "per_parameter"),
        ("layer", "global"),
    ],
)
def test_no_scores_is_an_error(scores, granularity, scope):
    with pytest.raises(LocalizationError, match="no scores"):
        select(scores, 0.5, scope, granularity=granularity)


def test_an_empty_parameter_beside_others_selects_nothing():
    for scope in ("global", "per_parameter"):
        mask = select({"a": torch.zeros(0, 3), "b": torch.arange(4.0)}, 0.5, scope)
        assert mask.selections["a"].kind == "none" and mask.count() == 2


@pytest.mark.parametrize("ratio", [0, -0.1, 1.0001, math.nan, True, "0.1", None])
def test_ratios_outside_the_unit_interval_are_refused(ratio):
    with pytest.raises(MaskError, match="ratio"):
        select(random_scores(), ratio)


def test_unknown_scope_and_granularity_are_refused():
    with pytest.raises(MaskError, match="scope"):
        select(random_scores(), 0.1, "local")
    with pytest.raises(MaskError, match="granularity"):
        select(random_scores(), 0.1, granularity="neuron")
    with pytest.raises(MaskError, match="layer"):
        select(random_scores(), 0.1, "per_parameter", granularity="layer")


def test_requires_grad_and_strided_scores_work():
    a = torch.randn(6, 4, requires_grad=True)
    assert torch.equal(select({"a": a.T}, 0.25).dense("a"), select({"a": a}, 0.25).dense("a").T)


def test_selecting_runs_on_one_thread_and_gives_the_others_back():
    seen = []

    class Watched(dict):
        def __getitem__(self, name):
            seen.append(torch.get_num_threads())
            return super().__getitem__(name)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        select(Watched(a=torch.rand(8)), 0.5)
        assert set(seen) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
