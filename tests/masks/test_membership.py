"""When a row, a head or a layer belongs to a mask: by hand, and of every kind of mask."""

import pytest
import torch

from lit_align.errors import MaskError
from lit_align.masks import HeadLayout, ParameterMask, Selection, conv1d_row_axes, select
from lit_align.masks.linear_layers import linear_layers
from lit_align.masks.membership import head_shares, linear_weight_names, members, row_densities
from tests.tiny_models import tiny_model


def random_scores(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(p.shape, generator=generator) for n, p in model.named_parameters()}


def of_dense(rows):
    return ParameterMask.from_dense({"h.0.w.weight": torch.tensor(rows, dtype=torch.bool)})


def test_a_row_belongs_from_the_share_on():
    mask = of_dense([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    for share, expected in [
        (0.6, [True, False, False, True]),
        (0.4, [True, True, False, True]),
        (1.0, [False, False, False, True]),
        (0.01, [True, True, False, True]),
    ]:
        assert members(mask, "row", share)["h.0.w.weight"].tolist() == expected


def test_the_share_is_the_decimal_it_is_written_as():
    dense = torch.zeros(1, 100, dtype=torch.bool)
    dense[:, :7] = True  # 0.07 * 100 is 7.000000000000001
    mask = ParameterMask.from_dense({"w": dense})
    assert members(mask, "row", 0.07)["w"].tolist() == [True]


def test_columns_are_rows_where_the_axis_says_so():
    mask = of_dense([[1, 0, 1], [1, 0, 0]])
    flags = members(mask, "row", 1.0, row_axes={"h.0.w.weight": 1})
    assert flags["h.0.w.weight"].tolist() == [True, False, False]


def test_an_element_of_a_vector_is_its_own_row_and_an_empty_parameter_has_none():
    mask = ParameterMask(
        {
            "norm": Selection.of_positions((4,), torch.tensor([1, 3])),
            "all": Selection.all((2,)),
            "scalar": Selection.all(()),
            "empty": Selection.none((0, 5)),
            "w": Selection.none((3, 5)),
        }
    )
    found = {name: flags.tolist() for name, flags in members(mask, "row").items()}
    assert found == {
        "norm": [False, True, False, True], "all": [True, True], "scalar": [True], "empty": [],
        "w": [False] * 3,
    }  # fmt: skip
    assert [d.tolist() for d in row_densities(mask)] == [[0.0] * 3]


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_masks_of_rows_and_heads_give_their_units_back_whatever_the_share(kind, share):
    model = tiny_model(kind)
    layout, axes = HeadLayout.from_model(model), conv1d_row_axes(model)
    scores = random_scores(model)
    rows = select(scores, 0.3, granularity="row", row_axes=axes)
    for name, flags in members(rows, "row", share).items():
        if rows.selections[name].rows is not None:
            assert flags.nonzero()[0].tolist() == rows.selections[name].rows.tolist()
        elif rows.selections[name].kind in ("all", "none"):
            assert set(flags.tolist()) <= {rows.selections[name].kind == "all"}
    heads = select(scores, 0.3, granularity="head", heads=layout)
    found = members(heads, "head", share, heads=layout)
    assert {b: f.nonzero()[0].tolist() for b, f in found.items()} == layout.chosen_heads(
        heads.selections
    )
    assert sum(int(f.sum()) for f in found.values()) == 3


def test_a_sibling_whose_keys_and_values_train_is_not_chosen():
    model = tiny_model("llama")  # query heads 2 and 3 share group 1
    layout = HeadLayout.from_model(model)
    scores = {n: torch.zeros(p.shape) for n, p in model.named_parameters()}
    scores["model.layers.1.self_attn.q_proj.weight"][16:24] = 1.0
    mask = select(scores, 0.1, granularity="head", heads=layout)
    shares = head_shares(mask, layout)
    assert shares["0"].tolist() == [0.0] * 4 and shares["1"].tolist() == [0.0, 0.0, 1.0, 0.0]
    flags = members(mask, "head", 0.6, heads=layout)  # 2/3 of the sibling's entries are selected
    assert flags["1"].tolist() == [False, False, True, False]


def test_the_share_of_a_head_is_the_least_of_its_parts():
    model = tiny_model("llama")
    layout = HeadLayout.from_model(model)
    dense = {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in model.named_parameters()}
    prefix = "model.layers.0.self_attn."
    dense[prefix + "q_proj.weight"][0:6] = True  # 6 of head 0's 8 rows
    dense[prefix + "k_proj.weight"][0:8, :16] = True  # half of group 0
    dense[prefix + "v_proj.weight"][0:8] = True
    shares = head_shares(ParameterMask.from_dense(dense), layout)
    assert shares["0"].tolist() == [0.5, 0.0, 0.0, 0.0]


def test_layers_are_the_linear_ones_and_none_of_the_rest():
    model = tiny_model("llama", tied=False)
    mask = ParameterMask.full(model)
    assert list(members(mask, "layer")) == list(linear_layers(model))
    assert all(flags.tolist() == [True] for flags in members(mask, "layer").values())


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("gpt2", True)])
def test_names_and_shapes_tell_the_linear_layers(kind, tied):
    model = tiny_model(kind, tied=tied)
    assert set(linear_weight_names(ParameterMask.full(model))) == set(linear_layers(model))


def test_what_cannot_be_done_is_refused():
    model = tiny_model("llama")
    mask = ParameterMask.full(model)
    with pytest.raises(MaskError, match="layout"):
        members(mask, "head")
    with pytest.raises(MaskError, match="not 'neuron'"):
        members(mask, "neuron")
    for share in (0, 1.5, True, float("nan"), "half"):
        with pytest.raises(MaskError, match="share of a unit"):
            members(mask, "row", share)
    with pytest.raises(MaskError, match=r"'nowhere'.*another model"):
        members(mask, "layer", layers=["nowhere"])
    small = ParameterMask({n: Selection.all((4, 4)) for n in mask.selections})
    with pytest.raises(MaskError, match="too small for 4 heads of 8"):
        head_shares(small, HeadLayout.from_model(model))
    with pytest.raises(MaskError, match=r"q_proj.*another model"):
        head_shares(of_dense([[1]]), HeadLayout.from_model(model))
