"""Reference log-probs on disk: what is written is read, anything else refused with its reason."""

import json
import shutil

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lit_align.errors import TrainingError
from lit_align.modules import reference_store
from lit_align.modules.reference_store import ReferenceStore, sequence_digest
from tests.tiny_models import save_tiny_model

KEY = {"model": "a" * 64, "truncation": "keep_start 512", "delta": None}


def ids(*values):
    return np.array(values, np.int32)


A, B = sequence_digest(ids(1, 2), ids(3)), sequence_digest(ids(1), ids(2, 3))
LOGPS = {A: np.array([-0.5], np.float32), B: np.array([-1.0, -2.0], np.float32)}


@pytest.fixture
def store(tmp_path):
    return ReferenceStore(tmp_path / "cache", KEY)


@pytest.fixture
def part(store):
    """A good part's path."""
    assert store.names() == []
    name = store.write(LOGPS)
    assert store.names() == [name]
    return store.folder / name


def test_what_is_written_is_read(store, part):
    found = store.read(part.name, {A, B})
    assert found.keys() == LOGPS.keys()
    for digest, values in LOGPS.items():
        assert found[digest].dtype == np.float32 and np.array_equal(found[digest], values)
    assert store.read(part.name, {B}).keys() == {B}


def test_a_digest_is_of_the_tokens_and_of_where_the_response_begins():
    assert A != B  # of the same three tokens
    assert len({A, B, sequence_digest(ids(1, 2), ids(4)), sequence_digest(ids(9, 2), ids(3))}) == 4
    assert sequence_digest(ids(1, 2).astype(np.int64), ids(3)) == A


def test_no_two_writes_share_a_name(store, part):
    other = ReferenceStore(store.folder, KEY)
    again = other.write(LOGPS)
    assert sorted([again, part.name]) == store.names()
    assert all(store.read(name, {A, B}).keys() == {A, B} for name in store.names())


def test_what_a_killed_process_left_is_no_part(store, part):
    shutil.copy(part, part.with_name(f".{part.name}.123.partial"))
    assert store.names() == [part.name]


@pytest.mark.parametrize("name", [*KEY, "layout"])
def test_another_key_is_named(store, part, name):
    other = ReferenceStore(store.folder, KEY | {name: "other"})
    with pytest.raises(TrainingError, match="name another folder, or remove") as error:
        other.read(part.name, {A})
    named = [n for n in [*KEY, "layout"] if f"{n} (" in str(error.value)]
    assert named == [name]
    assert "other here" in str(error.value) and "a" * 13 not in str(error.value)


def test_a_folder_that_is_a_file_is_said(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(TrainingError, match="reference_cache"):
        ReferenceStore(tmp_path / "cache", KEY).names()


def test_a_part_that_only_others_see_is_said(store):
    store.names()
    with pytest.raises(TrainingError, match="all ranks must see the same folder"):
        store.read("of-another-rank.safetensors", {A})


def test_a_full_disk_is_said(store, part, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reference_store, "write_atomically", full)
    with pytest.raises(TrainingError, match=r"cannot be written: .*No space left"):
        store.write(LOGPS)


# ---- damaged and crafted parts -------------------------------------------------------------------


def refused(store, part, why):
    with pytest.raises(TrainingError, match=why) as error:
        store.read(part.name, {A, B})
    assert str(part) in str(error.value) and "remove the file" in str(error.value)


@pytest.mark.parametrize("keep", [0, 5, 200, -3])
def test_a_truncated_part_is_refused(store, part, keep):
    part.write_bytes(part.read_bytes()[:keep])
    refused(store, part, "not usable")


def test_any_changed_byte_of_the_numbers_is_seen(store, part):
    good = part.read_bytes()
    numbers = 4 * 3 + 8 * 2 + 32 * 2
    for i in range(len(good) - numbers, len(good)):
        part.write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :])
        refused(store, part, "checksum")


def test_other_files_are_refused(store, part, tmp_path):
    shutil.copy(save_tiny_model(tmp_path / "model") / "model.safetensors", part)
    with pytest.raises(TrainingError, match=r"format is 'pt'.*name an empty folder") as error:
        store.read(part.name, {A})
    assert str(part) in str(error.value) and "remove" not in str(error.value)  # a model's weights
    part.unlink()
    part.mkdir()
    refused(store, part, "not usable")


def crafted(part, *, key=None, checksum=True, **tensors):
    """Write a part anew with some of it replaced, and a checksum that fits."""
    with safe_open(part, framework="np") as file:
        metadata = dict(file.metadata())
    kept = {n: t for n, t in (load_file(part) | tensors).items() if t is not None}
    metadata["key"] = metadata["key"] if key is None else key
    if kept.keys() == reference_store.TENSORS.keys():
        metadata["checksum"] = reference_store._checksum(metadata["key"], kept)
    save_file(kept, part, metadata)


def lengths(*values):
    return np.array(values, np.int64)


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({"logps": np.float32([-1, np.nan, -2])}, "NaN"),
        ({"logps": np.float32([-1, -np.inf, -2])}, "infinite"),
        ({"logps": np.float32([-1, 0.01, -2])}, "above 0"),
        ({"logps": np.float64([-1, -1, -2])}, "logps is F64"),
        ({"logps": np.float32([[-1, -1, -2]])}, "logps is F32 of shape"),
        ({"logps": None}, "tensors"),
        ({"more": lengths(1)}, "tensors"),
        ({"lengths": lengths(1, 3)}, "add up"),
        ({"lengths": lengths(4, -1)}, "add up"),
        ({"lengths": lengths(3, 0)}, "add up"),
        ({"lengths": lengths(2**62, 2**62 + 3)}, "add up"),
        ({"lengths": lengths(1, 1, 1)}, "digests"),
        ({"lengths": np.int32([1, 2])}, "lengths is I32"),
        ({"digests": np.zeros((2, 31), np.uint8)}, "digests"),
        ({"digests": np.zeros(64, np.uint8)}, "digests"),
    ],
)
def test_crafted_parts_are_refused(store, part, tensors, why):
    crafted(part, **tensors)
    refused(store, part, why)


@pytest.mark.parametrize("key", ["", "[", "[1]", "3", "[" * 100_000, "null"])
def test_crafted_keys_are_refused(store, part, key):
    crafted(part, key=key)
    refused(store, part, "key is no JSON")


def test_a_key_of_another_type_differs(store, part):
    crafted(part, key=json.dumps({"model": [1, {"a": 2}]}))
    with pytest.raises(TrainingError, match="another run"):
        store.read(part.name, {A})


def test_rounding_above_0_is_taken(store):
    assert reference_store.is_usable(np.float32([0.0, 1e-5, -3]))
    assert not reference_store.is_usable(np.float32([2e-3]))
