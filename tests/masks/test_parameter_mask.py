import copy
import pickle

import pytest
import torch

from lit_align.errors import MaskError
from lit_align.masks import MaskMetadata, ParameterMask, Selection, named_shapes
from tests.tiny_models import tiny_model


def make(seed=0, density=0.4, **metadata):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"emb": (9, 5), "layers.0.w.weight": (4, 6), "layers.1.w.weight": (4, 6), "norm": (7,)}
    dense = {n: torch.rand(s, generator=generator) < density for n, s in shapes.items()}
    return ParameterMask.from_dense(dense, MaskMetadata(**metadata))


def flat(mask):
    return torch.cat([mask.dense(name).flatten() for name in mask.selections])


def test_full_covers_every_parameter_and_a_tied_one_once():
    model = tiny_model("llama")
    mask = ParameterMask.full(model, base_fingerprint="ab")
    assert mask.count() == mask.total() == sum(p.numel() for p in model.parameters())
    assert set(mask.selections) == {name for name, _ in model.named_parameters()}
    assert mask.density() == mask.metadata.realised_ratio == 1.0
    assert mask == ParameterMask.full(named_shapes(model))


def test_counts_and_dense():
    mask = make()
    assert mask.count() == flat(mask).sum() and mask.total() == 100
    assert mask.density() == mask.count() / 100
    assert mask.entries("emb").numel == mask.dense("emb").sum()
    with pytest.raises(MaskError, match="'head'"):
        mask.dense("head")
    with pytest.raises(MaskError, match="'head'"):
        mask.entries("head")


def test_algebra_and_jaccard():
    a, b = make(0), make(1)
    assert torch.equal(flat(a & b), flat(a) & flat(b))
    assert torch.equal(flat(a | b), flat(a) | flat(b))
    assert torch.equal(flat(a - b), flat(a) & ~flat(b))
    assert torch.equal(flat(~a), ~flat(a))
    assert a.jaccard(b) == (a & b).count() / (a | b).count() == b.jaccard(a)
    assert a.jaccard(a) == 1.0 and a.jaccard(~a) == 0.0
    nothing = a - a
    assert nothing.density() == 0.0 and nothing.jaccard(nothing) == 1.0


def test_algebra_keeps_what_metadata_still_holds():
    a, b = make(0, method="x", base_fingerprint="ab", ratio=0.4), make(1, method="y")
    both = (a & b).metadata
    assert (both.method, both.base_fingerprint, both.ratio) == ("(x & y)", "ab", None)
    assert both.realised_ratio == (a & b).density()
    assert (~a).metadata.method == "~x"
    assert (a | make(1, granularity="row")).metadata.granularity == "mixed"
    with pytest.raises(MaskError, match="ab and cd"):
        a & make(1, base_fingerprint="cd")


def test_algebra_needs_the_same_parameters():
    a = make()
    for other in (ParameterMask({}), ParameterMask.full({"emb": (9, 5)})):
        with pytest.raises(MaskError, match=r"lacks|does not have"):
            a & other
        with pytest.raises(MaskError):
            a.jaccard(other)


def test_digest_is_of_the_selection_alone():
    rows = Selection.of_rows((4, 6), torch.tensor([1, 2]))
    elements = Selection.of_dense(rows.dense())
    assert (rows.kind, elements.kind) == ("rows", "elements")
    a = ParameterMask({"w": rows, "v": Selection.all((3,))}, MaskMetadata("one"))
    b = ParameterMask({"v": Selection.all((3,)), "w": elements}, MaskMetadata("two", ratio=0.5))
    assert a.digest == b.digest and a == b and hash(a) == hash(b)
    others = [
        {"w": rows, "v": Selection.none((3,))},
        {"w": rows, "u": Selection.all((3,))},
        {"w": rows, "v": Selection.all((1, 3))},
        {"w": ~rows, "v": Selection.all((3,))},
        {"w": rows},
    ]
    assert len({a.digest, *(ParameterMask(o).digest for o in others)}) == 6
    assert a != "a mask"


def test_digest_is_stable_across_versions():
    mask = ParameterMask({"w": Selection.of_rows((4, 6), torch.tensor([1, 2]))})
    assert mask.digest == "3f64ab2f0fa03afef5e1a2d97f83a8199881c0eac9ae91f78f1de2d6ac826a1b"


def test_check_matches_names_what_differs():
    mask = make(base_fingerprint="ab")
    shapes = {name: s.shape for name, s in mask.selections.items()}
    mask.check_matches(shapes)
    mask.check_matches(shapes, "ab")
    make().check_matches(shapes, "cd")  # a mask that does not know its base fits any
    with pytest.raises(MaskError, match=r"ab.*cd"):
        mask.check_matches(shapes, "cd")
    with pytest.raises(MaskError, match="lacks 'bias'"):
        mask.check_matches(shapes | {"bias": (3,)})
    with pytest.raises(MaskError, match=r"'norm'.*\(7,\).*\(8,\)"):
        mask.check_matches(shapes | {"norm": (8,)})
    del shapes["emb"]
    with pytest.raises(MaskError, match="'emb', which the model does not have"):
        mask.check_matches(shapes)


def test_masks_can_be_copied_and_sent_to_another_process():
    mask = make()
    for copied in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert copied == mask and copied.metadata == mask.metadata


def test_selections_cannot_be_replaced():
    with pytest.raises(TypeError):
        make().selections["emb"] = Selection.none((9, 5))


def test_metadata_of_a_wrong_type_is_refused():
    with pytest.raises(MaskError, match="'ratio'"):
        MaskMetadata(ratio="0.1")
    with pytest.raises(MaskError, match="'ratio'"):
        MaskMetadata(ratio=True)
    with pytest.raises(MaskError, match="version 2"):
        MaskMetadata(format_version=2)


def test_repr_says_how_much():
    assert "45 of 45 entries in 1 parameters, full" in repr(ParameterMask.full({"emb": (9, 5)}))
