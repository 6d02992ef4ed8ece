"""Jaccard matrices by hand, and what random sets would have by counting every one of them."""

import itertools
import math

import pytest
import torch

from lit_align.errors import MaskError
from lit_align.masks import HeadLayout, ParameterMask, Selection, select
from lit_align.masks.compare import compare_masks, random_jaccard
from tests.masks.test_membership import random_scores
from tests.tiny_models import tiny_model


@pytest.mark.parametrize(("a", "b", "n"), [(2, 3, 6), (3, 3, 7), (5, 4, 6), (1, 1, 1), (0, 2, 5)])
def test_random_sets_counted_one_by_one(a, b, n):
    first = set(range(a))
    indices = [
        len(first & set(other)) / len(first | set(other))
        for other in itertools.combinations(range(n), b)
    ]
    assert random_jaccard(a, b, n) == pytest.approx(math.fsum(indices) / len(indices), rel=1e-12)


def test_random_sets_of_many_agree_by_k_over_two_minus_k():
    for ratio in (0.1, 0.75):
        k = int(ratio * 10**9)
        assert random_jaccard(k, k, 10**9) == pytest.approx(ratio / (2 - ratio), rel=1e-8)
    assert random_jaccard(169, 169, 225) == pytest.approx(0.6018, abs=2e-4)  # ILA's 75 % of 225


@pytest.mark.parametrize(("a", "b", "n"), [(0, 0, 5), (6, 1, 5), (-1, 2, 5)])
def test_impossible_sizes_are_refused(a, b, n):
    with pytest.raises(MaskError, match=f"{a} and {b} out of {n}"):
        random_jaccard(a, b, n)


def elements(*positions):
    chosen = torch.tensor(positions, dtype=torch.int64)
    return ParameterMask({"h.0.w.weight": Selection.of_positions((4, 3), chosen)})


def test_elements_by_hand():
    found = compare_masks({"a": elements(0, 1, 2, 3), "b": elements(2, 3, 4), "c": elements()})
    assert found.names == ("a", "b", "c") and found.counts == (4, 3, 0) and found.units == 12
    assert found.jaccard == ((1.0, 2 / 5, 0.0), (2 / 5, 1.0, 0.0), (0.0, 0.0, None))
    assert found.random[0][1] == random_jaccard(4, 3, 12)
    assert found.random[0][0] is None and found.random[0][2] == 0.0


def test_rows_by_hand():
    a = elements(0, 1, 2, 3, 4, 6)  # rows 0 (3 of 3), 1 (2), 2 (1)
    b = elements(3, 4, 5, 9)  # rows 1 (3 of 3), 3 (1)
    found = compare_masks({"a": a, "b": b}, "row", share=0.6)
    assert found.counts == (2, 1) and found.units == 4
    assert found.jaccard[0][1] == 1 / 2 and found.share == 0.6
    assert compare_masks({"a": a, "b": b}, "row", share=1).jaccard[0][1] == 0.0


def test_two_masks_without_a_member_have_no_index():
    found = compare_masks({"a": elements(0), "b": elements(5)}, "row")
    assert found.counts == (0, 0) and found.jaccard == ((None, None), (None, None))
    assert found.random == ((None, None), (None, None))


def test_layers_leave_out_what_is_not_linear():
    model = tiny_model("llama", tied=False)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    chosen = [n for n in shapes if "mlp" in n]

    def layer_mask(names, everything_else=False):
        return ParameterMask(
            {
                n: Selection.all(s)
                if n in names or (everything_else and "norm" in n)
                else Selection.none(s)
                for n, s in shapes.items()
            }
        )

    with_norms = layer_mask(chosen[:-1], everything_else=True)
    found = compare_masks({"a": layer_mask(chosen), "b": with_norms}, "layer")
    assert found.units == 15 and found.counts == (6, 5)
    assert found.jaccard[0][1] == 5 / 6  # of layers, whatever their sizes


def test_columns_of_one_mask_are_the_rows_of_all():
    columns = Selection.of_rows((4, 3), torch.tensor([1]), axis=1)
    dense = columns.dense()
    masks = {"a": ParameterMask({"w": columns}), "b": ParameterMask.from_dense({"w": dense})}
    found = compare_masks(masks, "row", share=1)
    assert found.units == 3 and found.jaccard[0][1] == 1.0


def test_heads_of_two_masks():
    model = tiny_model("llama")
    layout = HeadLayout.from_model(model)
    masks = {
        str(seed): select(random_scores(model, seed), 0.5, granularity="head", heads=layout)
        for seed in (0, 1)
    }
    chosen = [
        {(b, h) for b, heads in layout.chosen_heads(m.selections).items() for h in heads}
        for m in masks.values()
    ]
    found = compare_masks(masks, "head", heads=layout)
    assert found.units == 8 and found.counts == (4, 4)
    assert found.jaccard[0][1] == len(chosen[0] & chosen[1]) / len(chosen[0] | chosen[1])


def test_masks_of_different_models_are_refused_and_both_named():
    other = ParameterMask({"h.0.w.weight": Selection.none((4, 5))})
    with pytest.raises(MaskError, match=r"one and two .*'h.0.w.weight' has shape \(4, 3\).*\(4, 5"):
        compare_masks({"one": elements(0), "two": other})
    more = ParameterMask({"h.0.w.weight": Selection.none((4, 3)), "b": Selection.none((1,))})
    with pytest.raises(MaskError, match="'b' is not in the first"):
        compare_masks({"one": elements(0), "two": more})
    vectors = ParameterMask({"b": Selection.all((2,))})
    with pytest.raises(MaskError, match="no layer to compare over in one"):
        compare_masks({"one": vectors, "two": vectors}, "layer")
    with pytest.raises(MaskError, match="two masks or more, not 1"):
        compare_masks({"one": elements(0)})
