"""Sharded checkpoints of two processes: whole or not there, verified, the newest sound one read."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from lit_align.checkpoint_file import choose_sound, find_damage, load_sound, load_sound_rest
from lit_align.errors import TrainingError
from lit_align.modules import sharded_saving
from lit_align.sharded_checkpoint import (
    CHECKSUMS_FILE,
    METADATA_FILE,
    REST_FILE,
    file_records,
    write_checksums,
)
from tests.modules.distributed_script import free_port
from tests.test_kills import ends, on_two, started
from tests.training_runs import assert_close_weights, assert_equal_weights

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed")


def sharded(model: Path, folder: Path, *each: dict) -> tuple[list[list[str]], str]:
    """Runs one after the other in one folder; how they ended on both ranks, and what was said."""
    runs = [{"out": str(folder), "strategy": "sharded", "port": free_port()} | one for one in each]
    return on_two(model, runs)


@pytest.fixture(scope="module")
def whole(tiny_llama_dir, tmp_path_factory) -> Path:
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    found, said = sharded(tiny_llama_dir, folder, {})
    assert found == [["status 0"], ["status 0"]], said
    return folder


@pytest.fixture
def saved(tmp_path) -> Path:
    """A checkpoint as two ranks write it, of one tensor and a number."""
    folder = tmp_path / "step=6.ckpt"
    dcp.save({"state_dict": {"a": torch.ones(3)}, "x": 1}, checkpoint_id=folder, no_dist=True)
    (folder / "__1_0.distcp").write_bytes(b"another")
    torch.save({"global_step": 6, "pytorch-lightning_version": "2.6"}, folder / REST_FILE)
    write_checksums(folder, file_records(folder, [path.name for path in folder.iterdir()]))
    return folder


@pytest.mark.long
def test_the_newest_stay_and_nothing_else(whole):
    folder = whole / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step=5.ckpt", "step=6.ckpt"]
    names = {METADATA_FILE, REST_FILE, CHECKSUMS_FILE, "__0_0.distcp", "__1_0.distcp"}
    assert {p.name for p in (folder / "step=6.ckpt").iterdir()} == names
    assert find_damage(folder / "step=6.ckpt") is None
    rest = torch.load(folder / "step=6.ckpt" / REST_FILE, weights_only=True)
    assert rest["global_step"] == 6 and "state_dict" not in rest


@pytest.mark.parametrize("name", [METADATA_FILE, REST_FILE, CHECKSUMS_FILE, "__1_0.distcp"])
def test_a_missing_or_changed_file_is_damage(name, saved):
    path = saved / name
    data = path.read_bytes()
    path.unlink()
    assert name in find_damage(saved)
    half = len(data) // 2
    path.write_bytes(data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :])
    assert find_damage(saved) is not None
    path.write_bytes(data[:half])
    with pytest.raises(TrainingError, match=r"step=6\.ckpt: not a checkpoint, or damaged"):
        load_sound_rest(saved)
    path.write_bytes(data)
    assert find_damage(saved) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files.pop("__1_0.distcp"), "'?__1_0.distcp'? does not belong"),
        (lambda files: files.pop(REST_FILE), "does not list"),
        (lambda files: files.update({"../x": files[REST_FILE]}), r"'\.\./x' is missing"),
        (lambda files: files.update({REST_FILE: {"bytes": 2**62, "sha256": ""}}), "is wrong"),
        (lambda files: files.update({REST_FILE: None}), "is wrong"),
    ],
)
def test_a_list_that_says_otherwise_is_damage(change, message, saved):
    found = json.loads((saved / CHECKSUMS_FILE).read_text())
    change(found["files"])
    (saved / CHECKSUMS_FILE).write_text(json.dumps(found))
    assert re.search(message, find_damage(saved))


def test_a_link_is_damage(saved, tmp_path):
    shutil.move(saved / "__1_0.distcp", tmp_path / "elsewhere")
    (saved / "__1_0.distcp").symlink_to(tmp_path / "elsewhere")
    assert "no plain file" in find_damage(saved)


def test_slurms_name_stands_for_the_newest(saved):
    asked = saved.rename(saved.parent / "hpc_ckpt_1.ckpt")
    assert choose_sound(asked) == asked
    newer = shutil.copytree(asked, saved.parent / "checkpoints" / "step=9.ckpt")
    newer.touch()
    assert choose_sound(asked) == newer
    (newer / REST_FILE).unlink()
    with pytest.warns(UserWarning, match=r"step=9\.ckpt is damaged \('meta\.pt' is missing\)"):
        assert choose_sound(asked) == asked


def test_shards_that_went_elsewhere_are_missed(saved):
    """As on machines that do not share the folder; what stood there is as it was."""
    partial = shutil.copytree(saved, saved.with_name(".step=6.ckpt.7.partial"))
    (partial / "__1_0.distcp").unlink()
    records = json.loads((saved / CHECKSUMS_FILE).read_text())["files"]
    with pytest.raises(TrainingError, match=r"__1_0\.distcp of another rank .* machines share"):
        sharded_saving._publish(partial, saved, records)
    assert find_damage(saved) is None


def test_without_the_strategy_the_way_out_is_named(saved):
    with pytest.raises(TrainingError, match=r"sharded checkpoint: .*ModelParallelStrategy"):
        load_sound(saved)


@pytest.mark.long
def test_two_sharded_ranks_killed_end_like_one_that_was_not(whole, tiny_llama_dir, tmp_path):
    """The last resumed run finds the newest checkpoint damaged, and says so."""
    each = [{"kill": kill} for kill in ("step:2", "write:2", "window:2", "sigterm:2")]
    found, said = sharded(tiny_llama_dir, tmp_path, *each, {"damage": "__1_0.distcp"})
    assert found[0] == ["killed", "killed", "killed", "status 143", "status 0"], said
    assert found[1] == ["killed", "status 1", "killed", "status 143", "status 0"], said
    assert re.search(r"is damaged \(the checksum of __1_0\.distcp is wrong\)", said)
    assert not list(tmp_path.rglob("*.partial"))
    final, expected = (load_file(f / "final.safetensors") for f in (tmp_path, whole))
    assert_equal_weights(final, expected)
    ends(started(tiny_llama_dir, [{"out": str(tmp_path / "one")}]))
    assert_close_weights(load_file(tmp_path / "one" / "final.safetensors"), final, atol=1e-6)


@pytest.mark.long
def test_a_full_disk_ends_all_ranks_and_leaves_the_checkpoint_before(whole, disk, tiny_llama_dir):
    """Room for one checkpoint: the second is given up on both ranks, whoever had no room."""
    size = sum(p.stat().st_size for p in (whole / "checkpoints" / "step=5.ckpt").iterdir())
    folder = disk(f"size={round(1.7 * size)}")
    found, said = sharded(tiny_llama_dir, folder, {})
    assert found == [["status 1"], ["status 1"]]
    message = r"step=2\.ckpt: the checkpoint could not be written; the ones before it are as they"
    assert len(re.findall(rf"TrainingError: .*{message}", said)) == 2, said[-3000:]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step=1.ckpt"]
    assert find_damage(folder / "checkpoints" / "step=1.ckpt") is None
    disk("size=4m")
    found, said = sharded(tiny_llama_dir, folder, {})
    assert found == [["status 0"], ["status 0"]], said[-3000:]
    final, expected = (load_file(f / "final.safetensors") for f in (folder, whole))
    assert_equal_weights(final, expected)
