"""Masks and deltas that are wrong in their indices alone: refused before anything is written."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lit_align.compact.delta import VALUES_PREFIX, apply_delta, export_delta
from lit_align.errors import DeltaError, MaskError
from lit_align.masks import ParameterMask, Selection, io, named_shapes
from tests.fuzz.artefacts import signed
from tests.tiny_models import tiny_model

ROWS, COLUMNS, ELEMENTS = (f"model.layers.0.self_attn.{n}_proj.weight" for n in "qko")
BAD_ROWS = {
    "negative": torch.tensor([-1, 2], dtype=torch.int32),
    "beyond the end": torch.tensor([0, 10**6], dtype=torch.int32),
    "beyond any memory": torch.tensor([0, 2**31 - 1], dtype=torch.int32),
    "unsorted": torch.tensor([2, 0], dtype=torch.int32),
    "twice": torch.tensor([2, 2], dtype=torch.int32),
    "floats": torch.tensor([0.0, 2.0]),
    "booleans": torch.tensor([True, False]),
    "unsigned": torch.tensor([0, 2], dtype=torch.uint8),
    "a matrix": torch.tensor([[0, 2]], dtype=torch.int32),
    "one number": torch.tensor(2, dtype=torch.int32),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A sound mask and a sound delta over rows, columns and elements."""
    model, folder = tiny_model(), tmp_path_factory.mktemp("indices")
    shapes = named_shapes(model)
    selections = {name: Selection.none(shape) for name, shape in shapes.items()}
    selections[ROWS] = Selection.of_rows(shapes[ROWS], torch.tensor([0, 2]))
    selections[COLUMNS] = Selection.of_rows(shapes[COLUMNS], torch.tensor([0, 2]), axis=1)
    selections[ELEMENTS] = Selection.of_dense(torch.rand(shapes[ELEMENTS]) < 0.1)
    mask = ParameterMask(selections)
    mask.save(folder / "mask")
    export_delta(model, folder / "delta", mask)
    return folder


def changed(path, name, tensor):
    """The file with another tensor, its digest and checksums made right again where possible."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    target = path.with_name(f"{path.name}.bad")
    save_file(load_file(path) | {name: tensor}, target, metadata)
    target.write_bytes(signed(lambda data, source: data)(target.read_bytes(), None))
    return target


@pytest.mark.parametrize("kind", ["mask", "delta"])
@pytest.mark.parametrize("name", [ROWS, COLUMNS])
@pytest.mark.parametrize("indices", BAD_ROWS.values(), ids=BAD_ROWS)
def test_rows_and_columns(files, kind, name, indices):
    check(changed(files / kind, name, indices), kind)


@pytest.mark.parametrize("kind", ["mask", "delta"])
@pytest.mark.parametrize(
    "change",
    [lambda t: t[:-1], lambda t: torch.cat([t, t]), lambda t: t[None], lambda t: t.int(),
     lambda t: t.view(torch.int8), lambda t: t[:0]],
)  # fmt: skip
def test_bitmaps(files, kind, change):
    check(changed(files / kind, ELEMENTS, change(load_file(files / kind)[ELEMENTS])), kind)


@pytest.mark.parametrize("name", [ROWS, COLUMNS, ELEMENTS])
@pytest.mark.parametrize(
    "change",
    [lambda t: t[:-1], lambda t: torch.cat([t, t]), lambda t: t[None], lambda t: t.long(),
     lambda t: t.bool(), lambda t: t * float("nan"), lambda t: t / 0, lambda t: t[:0]],
)  # fmt: skip
def test_values_of_deltas(files, name, change):
    name = VALUES_PREFIX + name
    check(changed(files / "delta", name, change(load_file(files / "delta")[name] + 1.0)), "delta")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["mask", "delta"])
@pytest.mark.parametrize("field", ["kind", "shape", "name"])
def test_descriptions(files, kind, field):
    """Each parameter takes over a field of the next one."""
    data = (files / kind).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    document = json.loads(header["__metadata__"][io._KEY])
    entries = document["parameters"]
    for entry, other in zip(entries, entries[1:] + entries[:1], strict=True):
        spoilt = [e | {field: other.get(field)} if e is entry else e for e in entries]
        if spoilt == entries:
            continue
        metadata = header["__metadata__"] | {io._KEY: json.dumps(document | {"parameters": spoilt})}
        new = json.dumps(header | {"__metadata__": metadata}).encode()
        target = files / "described.bad"
        target.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + size :])
        target.write_bytes(signed(lambda data, source: data)(target.read_bytes(), None))
        check(target, kind)


def check(path, kind):
    """Refused by the reader, or by the model, which stays as it was."""
    model = tiny_model(seed=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises((MaskError, DeltaError)):
        if kind == "mask":
            ParameterMask.load(path).check_matches(named_shapes(model))
        else:
            apply_delta(model, path)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
