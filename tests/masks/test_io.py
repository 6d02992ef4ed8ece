import json
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lit_align.errors import MaskError
from lit_align.masks import MaskMetadata, ParameterMask, Selection, io, select


@pytest.fixture
def mask():
    return ParameterMask(
        {
            "emb.weight": Selection.of_dense(torch.rand(9, 5) < 0.3),
            "rows": Selection.of_rows((6, 4), torch.tensor([0, 2, 5])),
            "columns": Selection.of_rows((6, 4), torch.tensor([1, 3]), axis=1),
            "all": Selection.all((3, 2, 2)),
            "none": Selection.none((4,)),
            "scalar": Selection.all(()),
        },
        MaskMetadata("weight_change", "row", 0.1, "global", "ab", extra={"seed": [1, None, "é"]}),
    )


@pytest.fixture
def path(mask, tmp_path):
    mask.save(tmp_path / "mask.safetensors")
    return tmp_path / "mask.safetensors"


def rewrite(path: Path, change=lambda document: None, change_tensors=lambda tensors: None) -> None:
    """Change a saved file as a careful forger would, checksum included."""
    with safe_open(path, framework="pt") as file:
        document = json.loads(file.metadata()[io._KEY])
    tensors = load_file(path)
    change_tensors(tensors)
    del document["checksum"]
    change(document)
    document["checksum"] = io._checksum(document)
    save_file(tensors, path, {io._KEY: json.dumps(document)})


def test_round_trip(mask, path):
    loaded = ParameterMask.load(path)
    assert loaded == mask and loaded.metadata == mask.metadata
    assert list(loaded.selections) == list(mask.selections)
    for name, selection in mask.selections.items():
        other = loaded.selections[name]
        assert (other.kind, other.shape, other.axis) == (
            selection.kind,
            selection.shape,
            selection.axis,
        )
        assert torch.equal(other.dense(), selection.dense())


def test_a_mask_without_any_tensor_round_trips(tmp_path):
    for mask in (ParameterMask.full({"a": (3, 4)}), ParameterMask({})):
        mask.save(tmp_path / "m")
        assert ParameterMask.load(tmp_path / "m") == mask


def test_ten_percent_of_elements_take_at_most_1_1_bits_each(tmp_path):
    mask = select({f"layers.{i}.weight": torch.rand(200, 507) for i in range(4)}, 0.1)
    mask.save(tmp_path / "m")
    assert (tmp_path / "m").stat().st_size * 8 <= 1.1 * mask.total()


def test_files_of_equal_masks_are_equal_bytes(mask, path, tmp_path):
    ParameterMask.load(path).save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_saving_makes_the_folder_replaces_the_file_and_leaves_nothing_else(mask, tmp_path):
    path = tmp_path / "new" / "mask.safetensors"
    (~mask).save(path)
    mask.save(path)
    assert ParameterMask.load(path) == mask
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_save_leaves_the_old_file(mask, path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        (~mask).save(path)
    assert ParameterMask.load(path) == mask and list(path.parent.iterdir()) == [path]


def test_loading_keeps_no_hold_on_the_file(mask, path):
    loaded = ParameterMask.load(path)
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert loaded == mask and torch.equal(loaded.dense("emb.weight"), mask.dense("emb.weight"))


def test_metadata_that_json_cannot_hold_is_refused(mask, tmp_path):
    for extra in ({"x": torch.zeros(1)}, {"x": float("nan")}, {("a", "b"): 1}):
        bad = ParameterMask(mask.selections, MaskMetadata(extra=extra))
        with pytest.raises(MaskError, match="JSON"):
            bad.save(tmp_path / "bad")
    assert list(tmp_path.iterdir()) == []


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(MaskError, match=str(path)):
            ParameterMask.load(path)


def test_an_ordinary_safetensors_file_is_not_a_mask(tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(MaskError, match="not a mask"):
        ParameterMask.load(tmp_path / "model.safetensors")


def test_every_truncation_is_an_error(path):
    data = path.read_bytes()
    for length in [*range(0, len(data), 37), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(MaskError, match=r"mask\.safetensors"):
            ParameterMask.load(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(MaskError, match=r"mask\.safetensors"):
        ParameterMask.load(path)


def test_flipped_bits_are_an_error_or_change_nothing(mask, path):
    data = path.read_bytes()
    source = random.Random(0)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    places = [source.randrange(len(data)) for _ in range(400)] + list(range(header, len(data)))
    refused = 0
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << source.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = ParameterMask.load(path)
        except MaskError as error:
            assert "mask.safetensors" in str(error)
            refused += 1
        else:  # in the padding or white space of the header
            assert loaded == mask and loaded.metadata == mask.metadata and place < header
    assert refused > 0.9 * len(places)


def test_random_bytes_are_an_error(path):
    source = random.Random(1)
    for length in (0, 1, 7, 8, 9, 64, 1000):
        path.write_bytes(source.randbytes(length))
        with pytest.raises(MaskError, match=r"mask\.safetensors"):
            ParameterMask.load(path)


def set_parameter(index, **fields):
    return lambda document: document["parameters"][index].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_parameter(0, shape=[2**40, 2**40]), "'emb.weight'.*shape"),
        (set_parameter(0, shape=[10**9, 100]), "'emb.weight'.*bitmap"),
        (set_parameter(0, shape=[-9, -5]), "'emb.weight'.*shape"),
        (set_parameter(0, shape=[11, 4]), "'emb.weight'.*past the last|damaged"),
        (set_parameter(0, shape=[9.0, 5]), "malformed"),
        (set_parameter(0, shape="9x5"), "malformed"),
        (set_parameter(0, shape=[True, 45]), "malformed"),
        (set_parameter(0, kind="rows"), "'emb.weight'.*row indices are stored as U8"),
        (set_parameter(1, kind="elements"), "'rows'.*bitmap"),
        (set_parameter(1, shape=[5, 4]), "'rows'.*outside"),
        (set_parameter(1, axis=2), "'rows'.*axis"),
        (set_parameter(1, axis=1), "'rows'.*outside"),
        (set_parameter(1, axis="0"), "malformed"),
        (set_parameter(1, kind="none"), "unexpected tensor 'rows'"),
        (set_parameter(3, kind="sone"), "'all'.*kind"),
        (set_parameter(3, kind="elements"), "tensor of 'all' is missing"),
        (set_parameter(3, kind=["all"]), "malformed"),
        (set_parameter(3, name="none"), "listed twice"),
        (set_parameter(3, name=3), "malformed"),
        (set_parameter(3, colour="red"), "malformed"),
        (set_parameter(3, kind="none"), "not the one that was saved"),
        (lambda d: d["parameters"].pop(), "not the one that was saved"),
        (lambda d: d["parameters"].append("x"), "malformed"),
        (lambda d: d.update(parameters={}), "list of parameters"),
        (lambda d: d.update(digest=0), "not the one that was saved"),
        (lambda d: d.update(extra=0), "damaged"),
        (lambda d: d.update(metadata=[]), "damaged"),
        (lambda d: d["metadata"].update(format_version=2), "version 2"),
        (lambda d: d["metadata"].update(ratio="0.1"), "'ratio'"),
        (lambda d: d["metadata"].update(colour="red"), "colour"),
    ],
)
def test_forged_documents_are_refused(path, change, message):
    rewrite(path, change)
    with pytest.raises(MaskError, match=rf"mask\.safetensors.*({message})"):
        ParameterMask.load(path)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("rows", torch.tensor([0, 2, 6], dtype=torch.int32), "'rows'.*outside"),
        ("rows", torch.tensor([-1, 2, 5]), "'rows'.*outside"),
        ("rows", torch.tensor([2, 0, 5]), "'rows'.*increasing"),
        ("rows", torch.tensor([0, 2, 2]), "'rows'.*increasing"),
        ("rows", torch.tensor([0.0, 2.0, 5.0]), "'rows'.*F32"),
        ("rows", torch.tensor([[0, 2, 5]]), "'rows'.*row indices"),
        ("rows", torch.arange(100), "'rows'.*row indices"),
        ("rows", torch.tensor([0, 2]), "not the one that was saved"),
        ("emb.weight", torch.zeros(5, dtype=torch.uint8), "'emb.weight'.*bitmap"),
        ("emb.weight", torch.zeros(6, dtype=torch.int8), "'emb.weight'.*bitmap"),
        ("emb.weight", torch.full((6,), 255, dtype=torch.uint8), "'emb.weight'.*past the last"),
        ("stranger", torch.zeros(1), "unexpected tensor 'stranger'"),
    ],
)
def test_forged_tensors_are_refused(path, name, tensor, message):
    rewrite(path, change_tensors=lambda tensors: tensors.update({name: tensor}))
    with pytest.raises(MaskError, match=rf"mask\.safetensors.*{message}"):
        ParameterMask.load(path)


def test_a_document_that_is_not_json_is_refused(path):
    for text in ("", "{", "[]", "null", "[" * 100_000, '{"checksum": 1}', '{"checksum": NaN}'):
        save_file({"a": torch.zeros(1)}, path, {io._KEY: text})
        with pytest.raises(MaskError, match="damaged"):
            ParameterMask.load(path)


def test_a_folder_is_said(tmp_path):
    with pytest.raises(MaskError, match="is a folder: name the mask's file"):
        ParameterMask.load(tmp_path)
