"""Checkpoints as files: no damaged byte is believed, and what is written is whole."""

import io
import os
import zipfile

import pytest
import torch

from lit_align.checkpoint_file import (
    VERSION,
    VerifiedCheckpointIO,
    find_damage,
    load_sound,
    newest_sound,
)
from lit_align.errors import TrainingError

CONTENT = {
    "state_dict": {"a": torch.arange(40.0)}, "global_step": 3, "loops": {"x": [1, 2]},
    VERSION: "2.6.0",
}  # fmt: skip


@pytest.fixture
def path(tmp_path):
    VerifiedCheckpointIO().save_checkpoint(CONTENT, tmp_path / "new" / "a.ckpt")
    return tmp_path / "new" / "a.ckpt"


def same(found) -> bool:
    tensors = torch.equal(found["state_dict"]["a"], CONTENT["state_dict"]["a"])
    return tensors and {n: found[n] for n in ("global_step", "loops")} == {
        n: CONTENT[n] for n in ("global_step", "loops")
    }


def test_round_trip_by_torch_too(path):
    assert same(load_sound(path))
    assert same(torch.load(path, weights_only=True))
    assert [p.name for p in path.parent.iterdir()] == ["a.ckpt"]


def test_no_flipped_bit_is_believed(path):
    """Of every 7th byte one bit; bytes that mean nothing (padding, dates) may change."""
    data, refused = path.read_bytes(), 0
    damaged = path.with_name("b.ckpt")
    places = range(0, len(data), 7)
    for place in places:
        damaged.write_bytes(
            data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]
        )
        try:
            assert same(load_sound(damaged)), place
        except TrainingError:
            refused += 1
    assert refused > len(places) / 4


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_shortened_file_is_refused(share, path):
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(TrainingError, match=r"a\.ckpt: not a checkpoint, or damaged"):
        load_sound(path)


def test_a_file_that_claims_more_than_it_holds_is_refused(path, tmp_path):
    """A compressed record could unfold into any size."""
    bomb = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr("archive/data/9", bytes(10**6))
    assert "compressed" in find_damage(bomb)


def test_code_in_it_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    buffer = io.BytesIO()
    torch.save(CONTENT | {"callbacks": Evil()}, buffer)
    (tmp_path / "evil.ckpt").write_bytes(buffer.getvalue())
    with pytest.raises(TrainingError, match="evil"):
        load_sound(tmp_path / "evil.ckpt")
    assert not (tmp_path / "run").exists()


def test_what_could_not_be_read_again_is_not_written(path):
    """A setting or a callback's state of a class that `weights_only` refuses."""
    content = CONTENT | {"callbacks": {"mine": {"where": path}}}
    message = r"new: no checkpoint is written, .* hold a pathlib\S*Path; "
    with pytest.raises(TrainingError, match=message):
        VerifiedCheckpointIO().save_checkpoint(content, path)
    assert same(load_sound(path))  # what stood there
    assert [p.name for p in path.parent.iterdir()] == ["a.ckpt"]


def test_the_newest_sound_one_is_found(tmp_path):
    paths = [tmp_path / name for name in ("last.ckpt", "last-v1.ckpt", "last-v2.ckpt")]
    for age, path in enumerate(paths):
        VerifiedCheckpointIO().save_checkpoint(CONTENT | {"global_step": age}, path)
        os.utime(path, (1e9 + age, 1e9 + age))
    assert newest_sound(paths) == paths[2]
    paths[2].write_bytes(b"")
    with pytest.warns(UserWarning, match=r"last-v2\.ckpt is damaged"):
        assert newest_sound(paths) == paths[1]
    with pytest.warns(UserWarning, match=r"last-v2\.ckpt is damaged"):
        assert VerifiedCheckpointIO().load_checkpoint(paths[2])["global_step"] == 1
    for path in paths:
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="damaged"):
        assert newest_sound(paths) is None
    with pytest.raises(TrainingError, match=r"last-v2\.ckpt"):
        VerifiedCheckpointIO().load_checkpoint(paths[2])
