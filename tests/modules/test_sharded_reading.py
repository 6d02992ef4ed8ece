"""Sharded checkpoints read whole by one process: right, or refused."""

import dataclasses
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lit_align.errors import TrainingError
from lit_align.modules.checkpointed import read_checkpoint
from lit_align.sharded_checkpoint import METADATA_FILE, REST_FILE, file_records, write_checksums

SELECTED = "language_model.model.norm.selected"


@pytest.fixture
def folder(tmp_path):
    """One shard, as ModelParallelStrategy lays it out, and Lightning's file beside it."""
    path = tmp_path / "step=1.ckpt"
    moments = {f"state.{SELECTED}.exp_avg": torch.ones(5)}
    dcp.save(
        {"state_dict": {SELECTED: torch.arange(5.0)}, "optimizer_0": moments},
        checkpoint_id=path,
        no_dist=True,
    )
    torch.save({"global_step": 1, "hyper_parameters": {"model": "m"}}, path / REST_FILE)
    return sealed(path)


def sealed(path):
    names = [p.name for p in path.iterdir() if p.name != "checksums.json"]
    write_checksums(path, file_records(path, names))
    return path


def with_metadata(path, change):
    """The same checkpoint with other claims, and the checksums to match."""
    file = path / METADATA_FILE
    metadata = pickle.loads(file.read_bytes())
    name = f"state_dict.{SELECTED}"
    metadata.state_dict_metadata[name] = change(metadata.state_dict_metadata[name])
    file.write_bytes(pickle.dumps(metadata))
    return sealed(path)


def test_what_trained_is_put_together(folder):
    checkpoint = read_checkpoint(folder)
    assert checkpoint["global_step"] == 1 and checkpoint["hyper_parameters"] == {"model": "m"}
    assert checkpoint["state_dict"].keys() == {SELECTED}  # no moments
    assert torch.equal(checkpoint["state_dict"][SELECTED], torch.arange(5.0))


def test_a_tensor_larger_than_its_files_is_refused(folder):
    with_metadata(folder, lambda d: dataclasses.replace(d, size=torch.Size([2**40])))
    with pytest.raises(TrainingError, match="claims 4398046511104 bytes"):
        read_checkpoint(folder)


def test_a_tensor_that_its_shards_do_not_fill_is_refused(folder):
    with_metadata(folder, lambda d: dataclasses.replace(d, size=torch.Size([6])))
    with pytest.raises(TrainingError, match=r"damaged: its shards do not make up .*norm"):
        read_checkpoint(folder)


def test_a_shard_that_does_not_fit_is_refused(folder):
    def elsewhere(described):
        moved = [dataclasses.replace(c, offsets=torch.Size([3])) for c in described.chunks]
        return dataclasses.replace(described, chunks=moved)

    with_metadata(folder, elsewhere)
    with pytest.raises(TrainingError, match=r"damaged|not a sharded checkpoint"):
        read_checkpoint(folder)


def test_a_changed_shard_is_refused(folder):
    shard = next(folder.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(TrainingError, match=f"the checksum of {shard.name} is wrong"):
        read_checkpoint(folder)
