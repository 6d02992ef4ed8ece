import itertools

import pytest
import torch

from lit_align.errors import MaskError
from lit_align.masks import Selection

SHAPE = (5, 7)


def index(*values):
    return torch.tensor(values, dtype=torch.int64)


def samples(shape=SHAPE):
    """Selections of every kind of one 2-D parameter."""
    dense = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4
    return [
        Selection.none(shape),
        Selection.all(shape),
        Selection.of_rows(shape, index(0, 3)),
        Selection.of_rows(shape, index(1, 3, 4)),
        Selection.of_rows(shape, index(2, 6), axis=1),
        Selection.of_dense(dense),
    ]


def test_samples_have_every_kind():
    assert [s.kind for s in samples()] == ["none", "all", "rows", "rows", "rows", "elements"]


@pytest.mark.parametrize("a", samples())
def test_views_of_one_selection_agree(a):
    dense = a.dense()
    assert dense.shape == SHAPE and dense.dtype == torch.bool
    assert a.count() == dense.sum()
    assert torch.equal(a.positions(), dense.flatten().nonzero().flatten())
    bitmap = torch.from_numpy(a.packed().copy())
    assert torch.equal(Selection.of_bitmap(SHAPE, bitmap).dense(), dense)


@pytest.mark.parametrize(("a", "b"), itertools.product(samples(), samples()))
def test_set_algebra_equals_that_of_dense_masks(a, b):
    assert torch.equal((a & b).dense(), a.dense() & b.dense())
    assert torch.equal((a | b).dense(), a.dense() | b.dense())
    assert torch.equal((a - b).dense(), a.dense() & ~b.dense())
    assert torch.equal((~a).dense(), ~a.dense())


def test_rows_stay_rows_under_algebra():
    a, b = Selection.of_rows(SHAPE, index(0, 3)), Selection.of_rows(SHAPE, index(1, 3))
    assert (a & b).rows.tolist() == [3]
    assert (a | b).rows.tolist() == [0, 1, 3]
    assert (a - b).rows.tolist() == [0]
    assert (~a).rows.tolist() == [1, 2, 4]
    columns = Selection.of_rows(SHAPE, index(2), axis=1)
    assert (~columns).axis == 1 and (a & columns).kind == "elements"


def test_everything_becomes_all_and_nothing_becomes_none():
    assert Selection.of_rows(SHAPE, torch.arange(5)).kind == "all"
    assert Selection.of_rows(SHAPE, torch.arange(7), axis=1).kind == "all"
    assert Selection.of_rows(SHAPE, index()).kind == "none"
    assert Selection.of_dense(torch.ones(SHAPE, dtype=torch.bool)).kind == "all"
    assert Selection.of_dense(torch.zeros(SHAPE, dtype=torch.bool)).kind == "none"
    a = Selection.of_rows(SHAPE, index(0, 3))
    assert (a | ~a).kind == "all" and (a & ~a).kind == "none"


def test_small_shapes():
    assert Selection.all(()).count() == 1 and Selection.all(()).dense().shape == ()
    assert Selection.all((0, 3)).kind == "none"
    assert Selection.of_dense(torch.zeros(0, 3, dtype=torch.bool)).kind == "none"
    assert Selection.of_dense(torch.tensor(True)).kind == "all"


def test_rows_of_a_vector_are_its_elements():
    a = Selection.of_rows((6,), index(1, 4))
    assert a.kind == "elements" and a.positions().tolist() == [1, 4]


def test_rows_of_a_3d_parameter_run_over_its_leading_dimensions():
    a = Selection.of_rows((2, 3, 4), index(1, 3))
    expected = torch.zeros(2, 3, 4, dtype=torch.bool)
    expected[0, 1] = expected[1, 0] = True
    assert torch.equal(a.dense(), expected) and a.count() == 8


@pytest.mark.parametrize("shape", [(5, 7), (9,), (2, 3, 4)])
def test_entries_of_elements(shape):
    dense = torch.rand(shape) < 0.4
    entries = Selection.of_dense(dense).entries()
    assert entries.kind == "elements" and entries.positions.dtype == torch.int64
    assert torch.equal(entries.positions.long(), dense.flatten().nonzero().flatten())
    matrix = dense.reshape(-1, shape[-1])
    assert entries.row_offsets.tolist() == [0, *matrix.sum(1).cumsum(0).tolist()]
    assert entries.numel == dense.sum()


def test_entries_of_rows_and_all():
    rows = Selection.of_rows(SHAPE, index(2, 6), axis=1)
    entries = rows.entries()
    assert (entries.kind, entries.axis, entries.rows.tolist()) == ("rows", 1, [2, 6])
    assert entries.numel == rows.count() == 10
    assert Selection.all(SHAPE).entries().numel == 35
    with pytest.raises(MaskError, match="nothing"):
        Selection.none(SHAPE).entries()


def uint8(*values):
    return torch.tensor(values, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Selection("some", SHAPE), "kind"),
        (lambda: Selection("none", (-1, 3)), "shape"),
        (lambda: Selection("none", (2**40, 2**40)), "shape"),
        (lambda: Selection("none", (2.0,)), "shape"),
        (lambda: Selection("rows", SHAPE), "contradict"),
        (lambda: Selection("all", SHAPE, rows=index(1)), "contradict"),
        (lambda: Selection("none", SHAPE, bitmap=uint8(0, 0, 0, 0, 0)), "contradict"),
        (lambda: Selection.of_rows(SHAPE, index(1, 5)), "outside"),
        (lambda: Selection.of_rows(SHAPE, index(-1, 2)), "outside"),
        (lambda: Selection.of_rows(SHAPE, index(3, 1)), "increasing"),
        (lambda: Selection.of_rows(SHAPE, index(1, 1)), "increasing"),
        (lambda: Selection.of_rows(SHAPE, index(1).int()), "int64"),
        (lambda: Selection.of_rows(SHAPE, index(1)[None]), "1-D"),
        (lambda: Selection.of_rows(SHAPE, index(1), axis=2), "axis"),
        (lambda: Selection.of_rows((2, 3, 4), index(1), axis=1), "axis"),
        (lambda: Selection("rows", (6,), rows=index(1)), "axis"),
        (lambda: Selection.of_rows((), index(0)), "axis"),
        (lambda: Selection.of_positions(SHAPE, index(35)), "outside"),
        (lambda: Selection.of_bitmap(SHAPE, uint8(1, 0, 0, 0)), "shape"),
        (lambda: Selection.of_bitmap(SHAPE, uint8(1, 0, 0, 0, 8)), "past the last"),
        (lambda: Selection.of_bitmap((8,), torch.tensor([1])), "uint8"),
        (lambda: Selection.of_dense(torch.ones(3)), "bool"),
        (lambda: Selection.all((2, 3)) & Selection.all((3, 2)), "cannot be combined"),
    ],
)
def test_contradictions_are_refused(build, message):
    with pytest.raises(MaskError, match=message):
        build()
