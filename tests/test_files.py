import os

import pytest

from lit_align.errors import PipelineError
from lit_align.files import locked_folder, partial_name, sha256_of_file, write_atomically


def test_replaces_the_whole_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, b"long old content")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomically(path, b"old")

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_sha256_follows_the_bytes(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    assert sha256_of_file(path) == known
    path.write_bytes(b"abd")
    assert sha256_of_file(path) != known


def test_nothing_is_written_through_links_that_somebody_left(tmp_path):
    """A run folder may come from anybody, and names of temporary files can be guessed."""
    (folder := tmp_path / "run").mkdir()
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (folder / ".lock").symlink_to(victim)
    with pytest.raises(PipelineError, match=r"\.lock is no plain file"):
        locked_folder(folder, PipelineError).__enter__()
    partial_name(folder / "a.json", os.getpid()).symlink_to(victim)
    write_atomically(folder / "a.json", b"new")
    (folder / "b.json").symlink_to(victim)
    write_atomically(folder / "b.json", b"new")
    assert victim.read_text() == "mine"
    assert (folder / "b.json").read_bytes() == b"new" and not (folder / "b.json").is_symlink()
