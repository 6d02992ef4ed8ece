"""torch.distributed.checkpoint unpickles what it reads: it is looked through first."""

import os
import pickle
import random
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from lit_align.errors import TrainingError
from lit_align.sharded_checkpoint import METADATA_FILE, check_sharded_checkpoint
from tests.fuzz.mutations import damaged

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed")


class Payload:
    def __init__(self, flag):
        self.flag = str(flag)

    def __reduce__(self):
        return os.mkdir, (self.flag,)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dcp") / "checkpoint"
    state = {"w": torch.randn(5, 3), "half": torch.ones(4, dtype=torch.bfloat16), "step": 3}
    dcp.save(state | {"groups": [{"lr": 0.1, "betas": (0.9, 0.95)}]}, checkpoint_id=folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoint")


def test_a_sound_one_is_let_through_and_loads(folder):
    check_sharded_checkpoint(folder)
    state = {"w": torch.zeros(5, 3), "step": 0}
    dcp.load(state, checkpoint_id=folder)
    assert state["step"] == 3 and state["w"].any()


def test_metadata_that_runs_something(folder, tmp_path):
    flag = tmp_path / "it ran"
    (folder / METADATA_FILE).write_bytes(pickle.dumps(Payload(flag)))
    with pytest.raises(TrainingError, match=r"brings code: it wants (posix|nt)\.mkdir"):
        check_sharded_checkpoint(folder)
    assert not flag.exists()
    with pytest.raises(CheckpointException):  # as torch would have read it
        dcp.load({"w": torch.zeros(5, 3)}, checkpoint_id=folder)
    assert flag.exists()


def test_a_value_that_runs_something(tmp_path):
    flag, folder = tmp_path / "it ran", tmp_path / "checkpoint"
    dcp.save({"w": torch.ones(2), "value": Payload(flag)}, checkpoint_id=folder)
    with pytest.raises(TrainingError, match="brings code"):
        check_sharded_checkpoint(folder)
    assert not flag.exists()


def with_metadata(folder, change):
    metadata = pickle.loads((folder / METADATA_FILE).read_bytes())
    change(metadata)
    (folder / METADATA_FILE).write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("relative_path", "../outside", "leads out"),
        ("relative_path", "/etc/passwd", "leads out"),
        ("relative_path", "absent", "absent"),
        ("offset", -1, "is at"),
        ("offset", 2**40, "cut off"),
        ("length", 2**40, "cut off"),
        ("length", "9", "is at"),
    ],
)
def test_parts_that_lead_out(folder, field, value, message):
    def change(metadata):
        object.__setattr__(next(iter(metadata.storage_data.values())), field, value)

    with_metadata(folder, change)
    with pytest.raises(TrainingError, match=message):
        check_sharded_checkpoint(folder)


def test_only_our_errors_come_out(folder):
    good, refused = (folder / METADATA_FILE).read_bytes(), 0
    for seed in range(60):
        (folder / METADATA_FILE).write_bytes(damaged(good, random.Random(seed)))
        try:
            check_sharded_checkpoint(folder)
        except TrainingError:
            refused += 1
    assert refused > 30
    for name in (METADATA_FILE, "__0_0.distcp"):
        (folder / name).write_bytes(b"")
        with pytest.raises(TrainingError):
            check_sharded_checkpoint(folder)
