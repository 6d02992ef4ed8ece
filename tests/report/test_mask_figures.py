"""Pictures and tables of masks: the numbers in them, and hostile names."""

import base64
import math
import re
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch

from lit_align.errors import MaskError
from lit_align.localizers.layer_gate import layer_gate_mask
from lit_align.masks import HeadLayout, MaskMetadata, ParameterMask, Selection, select
from lit_align.masks.compare import compare_masks, random_jaccard
from lit_align.masks.linear_layers import linear_layers
from lit_align.report import Curves, HeatMap, drawing, format_table, write_report
from lit_align.report.heat_maps import paint_heat_map, size_of_heat_map
from lit_align.report.html import HALF_INCHES
from lit_align.report.mask_figures import (
    density_figure,
    head_figure,
    jaccard_figure,
    layer_figure,
    mask_figures,
)
from lit_align.report.mask_tables import (
    block_table,
    facts_table,
    head_table,
    jaccard_table,
    module_table,
    parameter_table,
)
from tests.masks.test_membership import random_scores
from tests.report.test_html import Page
from tests.tiny_models import tiny_model

HOSTILE = [
    "<script>alert(1)</script>",
    "--><svg onload='x'>",
    r"$\frac{1}{",
    "a\nb\x07\ud83d",
    "&amp;",
]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def test_ranks_and_the_chosen_of_layer_scores():
    scores = {
        "model.layers.0.mlp.up.weight": 1.0,
        "model.layers.0.q.weight": 3.0,
        "model.layers.10.q.weight": 3.0,
        "model.layers.2.q.weight": -2.0,
        "head.weight": 2.0,
    }
    ranks = layer_figure(scores, "LIMA")
    assert ranks.columns == ("0", "2", "10", "none") and ranks.rows == ("mlp.up", "q", "head")
    assert ranks.values == (
        (4.0, None, None, None),
        (1.0, 5.0, 2.0, None),
        (None, None, None, 3.0),
    )
    assert (ranks.title, ranks.scale) == ("LIMA", "rank")
    chosen = layer_figure(scores, ratio=0.41)  # ceil(2.05) of 5
    assert chosen.values == ((0.0, None, None, None), (1.0, 0.0, 1.0, None), (*[None] * 3, 1.0))
    assert chosen.scale == "selected" and "the 3 layers of 5" in chosen.caption


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_scores_that_rank_nothing_are_refused(score):
    with pytest.raises(MaskError, match="'a' is"):
        layer_figure({"a": score})
    with pytest.raises(MaskError, match="no scores"):
        layer_figure({})
    for ratio in (0, 2.0, math.nan):
        with pytest.raises(MaskError, match="ratio"):
            layer_figure({"a": 1.0}, ratio=ratio)


def test_a_mask_of_layers_is_selected_or_not_any_other_a_density(model):
    scores = {name: float(i) for i, name in enumerate(linear_layers(model))}
    figure = layer_figure(layer_gate_mask(scores, model, 0.5))
    assert figure.scale == "selected" and "input_layernorm" not in figure.rows
    assert [sum(v == 1.0 for row in figure.values for v in row)] == [8]
    dense = layer_figure(select(random_scores(model), 0.1))
    assert dense.scale == "share" and "input_layernorm" in dense.rows
    inverted = layer_figure(~layer_gate_mask(scores, model, 0.5))  # selects the norms too
    assert inverted.scale == "share"


def test_heads_of_scores_and_of_masks(model):
    layout = HeadLayout.from_model(model)
    figure = head_figure({"3": torch.tensor([0.5, 2.0]), "7": [1.0]})
    assert figure.values == ((0.5, 2.0), (1.0, None)) and figure.rows == ("3", "7")
    mask = select(random_scores(model), 0.3, granularity="head", heads=layout)
    figure = head_figure(mask, layout)
    chosen = layout.chosen_heads(mask.selections)
    assert figure.scale == "selected" and figure.columns == ("0", "1", "2", "3")
    assert [[h for h, v in enumerate(row) if v] for row in figure.values] == list(chosen.values())
    assert head_figure(select(random_scores(model), 0.1), layout).scale == "share"
    with pytest.raises(MaskError, match="layout"):
        head_figure(mask)
    with pytest.raises(MaskError, match="no heads"):
        head_figure({})


def test_a_mask_that_remembers_the_scores_of_its_heads_shows_them():
    def remembering(scores):
        metadata = MaskMetadata(extra={"head_scores": scores})
        return ParameterMask({"h.0.w.weight": Selection.all((2, 2))}, metadata)

    figures = mask_figures(remembering({"0": [0.5, 1], "1": [2.0, 3.0]}))
    assert figures[1].values == ((0.5, 1.0), (2.0, 3.0)) and figures[1].scale == "score"
    for scores in ([1.0], {"0": 3.0}, {"0": ["<b>"]}, {"0": [math.inf]}, {}):
        with pytest.raises(MaskError, match="no scores of heads"):
            mask_figures(remembering(scores))
    long = dict(facts_table(remembering({str(i): [0.0] for i in range(99)})).rows)["head_scores"]
    assert len(long) == 203


def test_the_jaccard_figure_says_what_chance_gives(model):
    masks = {s: select(random_scores(model, i), 0.1) for i, s in enumerate("ab")}
    comparison = compare_masks(masks)
    figure = jaccard_figure(comparison)
    assert figure.values == comparison.jaccard and figure.remarks[0] == ("", "(0.05)")
    table = format_table(jaccard_table(comparison))
    count = comparison.counts[0]
    expected = f"{comparison.jaccard[0][1]:.3f} ({random_jaccard(count, count, 29344):.3f})"
    assert table.count(expected) == 2 and "29,344 elements" in table


def test_a_table_says_where_no_unit_belongs(model):
    masks = {s: select(random_scores(model, i), 0.1) for i, s in enumerate("ab")}
    table = jaccard_table(compare_masks(masks, "layer"))
    assert "No layer belongs to a, b: lower the share" in table.note
    assert table.rows[0] == ("a", 0, 0.0, None, None)


def test_densities_count_every_row_once():
    mask = ParameterMask(
        {
            "h.0.w.weight": Selection.of_positions((4, 10), torch.tensor([0, 10, 11, 12, 13, 14])),
            "h.0.all.weight": Selection.all((3, 2)),
            "h.0.norm": Selection.all((5,)),
        }
    )
    figure = density_figure(mask)
    assert dict(zip(figure.edges, figure.counts, strict=False))[0.0] == 2
    assert sum(figure.counts) == 7 and figure.counts[-1] == 3
    assert figure.counts[int(0.1 * 20)] == 1 and figure.counts[int(0.5 * 20)] == 1


def test_every_picture_of_a_mask_draws(model):
    pytest.importorskip("matplotlib")
    layout = HeadLayout.from_model(model)
    mask = select(random_scores(model), 0.1)
    figures = mask_figures(mask, layout, "N1")
    assert [f.title.split(":")[0] for f in figures] == ["N1"] * 3
    assert len(mask_figures(mask)) == 2
    for figure in figures:
        ElementTree.fromstring(drawing.draw(figure))
    assert drawing.picture(figures[0], "png").startswith(b"\x89PNG")


def test_cells_are_painted_in_the_colours_of_their_numbers():
    figure_module = pytest.importorskip("matplotlib.figure")
    axes = figure_module.Figure().add_subplot()
    cells = HeatMap("t", ("a",), ("0", "1", "2"), ((1.0, 0.0, None),), scale="selected")
    paint_heat_map(cells, axes)
    colours = axes.collections[0].to_rgba(axes.collections[0].get_array()).reshape(-1, 4)
    assert len({tuple(c) for c in colours.round(3).tolist()}) == 3
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["selected", "not selected"]


def drawn_words(picture: bytes) -> str:
    """matplotlib names every text that it draws as a path."""
    return " ".join(re.findall(r"<!-- (.*?) -->", picture.decode()))


def test_a_picture_of_its_own_says_what_it_shows(model):
    pytest.importorskip("matplotlib")
    masks = {name: select(random_scores(model, i), 0.1) for i, name in enumerate("ab")}
    figure = jaccard_figure(compare_masks(masks))
    said = drawn_words(drawing.picture(figure, "svg"))
    assert figure.title in said and "two random sets of the same" in said
    assert figure.title not in drawn_words(drawing.draw(figure).encode())  # the report says it


def test_blocks_without_attention_keep_their_numbers_in_pictures_of_scores(tmp_path):
    names = [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (1, 4) for p in "qkv"]
    config = SimpleNamespace(num_attention_heads=2, head_dim=2, hidden_size=4, model_type="x")
    layout = HeadLayout.from_shapes(config, dict.fromkeys(names, (4, 4)))
    extra = {"head_scores": {"0": [1.0, 2.0], "1": [3.0, 4.0]},
             "metric": "wasserstein", "representation": "qkv", "tau": 1.0}  # fmt: skip
    mask = ParameterMask({n: Selection.all((4, 4)) for n in names}, MaskMetadata(extra=extra))
    scores, heads = mask_figures(mask, layout, kinds=("scores", "heads"))
    assert scores.rows == heads.rows == ("1", "4")
    assert "wasserstein of qkv" in scores.caption


@pytest.mark.parametrize(("lines", "wide"), [(3, False), (6, True)])
def test_the_legend_of_many_lines_hides_none(lines, wide):
    matplotlib = pytest.importorskip("matplotlib")
    figure = Curves("t", "loss", {str(i): ([0, 1], [i, i]) for i in range(lines)})
    assert (drawing.size_inches(figure)[0] > HALF_INCHES) == wide
    with matplotlib.rc_context(drawing.STYLE):
        canvas = matplotlib.figure.Figure(figsize=drawing.size_inches(figure), layout="constrained")
        axes = canvas.add_subplot()
        drawing._paint(figure, axes)
        canvas.draw_without_rendering()
        inside = axes.get_legend().get_window_extent().x0 < axes.get_window_extent().x1
        assert inside is not wide and axes.get_window_extent().width > 300


def test_long_names_leave_room_for_the_cells():
    def size(name):
        return size_of_heat_map(HeatMap("t", (name,), ("0",) * 8, ((0.0,) * 8,)))[0]

    assert size("w" * 60) - size("q") > 1.5


def test_tables_of_a_mask(model):
    layout = HeadLayout.from_model(model)
    mask = select(random_scores(model), 0.25, granularity="head", heads=layout)
    facts = dict(facts_table(mask).rows)
    assert facts["entries selected"] == mask.count() and facts["ratio asked"] == 0.25
    assert (facts["linear layers"], facts["of these wholly selected"]) == (15, 0)
    assert facts["ratio realised, of all entries"] == mask.density()
    assert sum(row[1] for row in block_table(mask).rows) == mask.count()
    q = next(row for row in module_table(mask).rows if row[0] == "self_attn.q_proj")
    assert q == ("self_attn.q_proj", 2, 2 * 8 * 32, 2 * 32 * 32, 0.25)
    assert len(parameter_table(mask).rows) == len(mask.selections)
    heads = head_table(mask, layout)
    assert sum(row[2] for row in heads.rows) == 2 and "q: 25.00%" in heads.note


@pytest.mark.filterwarnings("ignore:Glyph")
def test_hostile_names_are_only_text(tmp_path):
    pytest.importorskip("matplotlib")
    scores = {f"model.layers.{i}.{name}.weight": float(i) for i, name in enumerate(HOSTILE)}
    mask = ParameterMask({name: Selection.all((3, 2)) for name in scores})
    masks = {name: mask if i else ~mask for i, name in enumerate(HOSTILE)}
    comparison = compare_masks(masks)
    figures = [
        *mask_figures(mask, title=HOSTILE[0]),
        *(layer_figure(scores, name) for name in HOSTILE),
        jaccard_figure(comparison),
        head_figure({name: [1.0] for name in HOSTILE}),
    ]
    tables = [facts_table(mask, HOSTILE[1]), parameter_table(mask), jaccard_table(comparison)]
    path = write_report(tmp_path / "r.html", title="r", figures=figures, tables=tables)
    text = path.read_text(encoding="utf-8")
    assert "<script" not in text and "<svg" not in text and "onload='x'>" not in text
    page = Page(text)
    assert not {"script", "svg"} & set(page.tags) and len(page.addresses) == len(figures)
    for address in page.addresses:
        svg = base64.b64decode(address.split(",", 1)[1]).decode()
        root = ElementTree.fromstring(svg)
        tags = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert not {"script", "foreignObject", "a"} & tags
        assert not re.search(r"<!--((?!-->).)*--[^>]", svg, flags=re.DOTALL)
        assert not any(key.startswith("on") for e in root.iter() for key in e.attrib)
    assert drawing.picture(figures[-1], "png").startswith(b"\x89PNG")
    assert "\x07" not in "".join(format_table(table) for table in tables)
