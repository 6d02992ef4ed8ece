"""Checkpoints that are sound files of torch, load with `weights_only=True`, and mean harm."""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from lit_align.checkpoint_file import load_sound
from lit_align.errors import MaskError, TrainingError
from lit_align.language_model import fingerprint
from lit_align.masks.convert import ModelNames, read_allo
from lit_align.pipelines.commands import export
from lit_align.sharded_checkpoint import METADATA_FILE, check_sharded_checkpoint
from lit_align.unpickling import check_tuples, check_unpickled
from tests.fuzz.limits import little_memory
from tests.tiny_models import save_tiny_model, tiny_model

NORM = "language_model.model.norm.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The content of a checkpoint of a full fit."""
    folder = save_tiny_model(tmp_path_factory.mktemp("checkpoints") / "model")
    entries = {f"language_model.{n}": p.detach() for n, p in tiny_model().named_parameters()}
    return {
        "state_dict": entries,
        "global_step": 3,
        "hyper_parameters": {"model": str(folder), "delta": None},
        "lit_align": {"base_fingerprint": fingerprint(folder), "mask_digest": None},
    }


def test_a_sound_one_is_exported(sound, tmp_path):
    torch.save(sound, tmp_path / "x.ckpt")
    export(str(tmp_path / "out"), checkpoint=str(tmp_path / "x.ckpt"))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def laughing(depth: int = 60) -> list:
    """A list that is small in a file, and larger than any memory to whoever prints it."""
    value: list = []
    for _ in range(depth):
        value = [value, value]
    return value


@pytest.mark.parametrize("key", ["global_step", "hyper_parameters", "lit_align", "state_dict", "x"])
@pytest.mark.timeout(60)
def test_what_unfolds_without_end(sound, tmp_path, key):
    torch.save(sound | {key: laughing()}, tmp_path / "x.ckpt")
    with pytest.raises(TrainingError, match="unfolds to more values"):
        load_sound(tmp_path / "x.ckpt")


# {t60: 1}, each tuple t twice the one before it: Python hashes 2^60 values to look the key up.
TUPLES = b"".join(b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60))
ENDLESS_KEY = b"\x80\x02})q\x00" + TUPLES + b"K\x01s."


@pytest.mark.timeout(60)
def test_a_key_that_is_not_hashed_without_end(sound, tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save(sound, tmp_path / "sound")
    with zipfile.ZipFile(tmp_path / "sound") as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, ENDLESS_KEY if name.endswith("data.pkl") else old.read(name))
    with pytest.raises(TrainingError, match="a tuple that unfolds"):
        load_sound(path)
    with pytest.raises(MaskError, match="a tuple that unfolds"):
        read_allo(path, ModelNames.of_model(tiny_model()))
    (tmp_path / METADATA_FILE).write_bytes(ENDLESS_KEY)
    with pytest.raises(TrainingError, match="a tuple that unfolds"):
        check_sharded_checkpoint(tmp_path)


@pytest.mark.parametrize("protocol", range(6))
def test_ordinary_pickles_are_let_through(sound, protocol):
    shared = (0.9, 0.999)
    value = {"a": [{"betas": shared}, {"betas": shared}], (1, 2): ({3, 4}, b"x", 2**70, -1.5, None)}
    check_tuples(pickle.dumps([value, value, OrderedDict(x=Path("y"))], protocol))
    check_tuples(pickle.dumps([*range(3000), ()], protocol))


def test_lists_that_hold_themselves_and_texts_that_repeat():
    endless: list = []
    endless.append(endless)
    with pytest.raises(ValueError, match="nested more than"):
        check_unpickled({"x": endless})
    with pytest.raises(ValueError, match="unfolds"):
        check_unpickled([["x" * 2**20] * 2**10])
    check_unpickled([{"a": (1, "b", {2.0}), 5: torch.ones(3)}, None] * 9)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1).expand(10**12), "larger than what it holds"),
        (torch.zeros(4).as_strided((3, 3), (0, 1)), "larger than what it holds"),
        (torch.empty(32, device="meta"), "not dense"),
        (torch.ones(32).to_sparse(), "not dense"),
        (torch.quantize_per_tensor(torch.ones(32), 0.1, 0, torch.qint8), "not dense"),
        (torch.ones(31), r"\(31,\) in the checkpoint and \(32,\) here"),
        (torch.ones(32).long(), "not all finite"),
        (torch.ones(32).bool(), "not all finite"),
        (torch.ones(32, dtype=torch.complex64), "not all finite"),
        (torch.full((32,), float("nan")), "not all finite"),
    ],
)
def test_tensors_that_are_no_weights(sound, tmp_path, tensor, message):
    entries = sound["state_dict"] | {NORM: tensor}
    torch.save(sound | {"state_dict": entries}, tmp_path / "x.ckpt")
    with little_memory(), pytest.raises(TrainingError, match=message):
        export(str(tmp_path / "out"), checkpoint=str(tmp_path / "x.ckpt"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lit_align", []),
        ("lit_align", {}),
        ("lit_align", {"base_fingerprint": ["x"]}),
        ("lit_align", {"adapter": 5}),
        ("lit_align", {"adapter": {"layers": 5}}),
        ("lit_align", {"adapter": {"layers": [5]}}),
        ("lit_align", {"adapter": {"layers": ["q_proj"]}}),
        ("hyper_parameters", []),
        ("hyper_parameters", {"model": 5}),
        ("hyper_parameters", {"model": None}),
        ("hyper_parameters", {"delta": ["x"]}),
    ],
)
def test_fields_of_other_types(sound, tmp_path, key, value):
    changed = sound[key] | value if isinstance(value, dict) and value else value
    torch.save(sound | {key: changed}, tmp_path / "x.ckpt")
    with pytest.raises(TrainingError):
        export(str(tmp_path / "out"), checkpoint=str(tmp_path / "x.ckpt"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 10**9}, "no adapters of rank 1000000000"),
        ({"rank": "32"}, "'rank' is no such setting, or not of its type"),
        ({"rank": True}, "'rank'"),
        ({"os.system": 1}, "'os.system'"),
        ({5: 1}, "5 is no such setting"),
        ({"kind": "x"}, "kind 'x'"),
    ],
)
def test_adapters_that_no_file_holds_are_not_made(sound, tmp_path, settings, message):
    content = sound | {
        "hyper_parameters": sound["hyper_parameters"] | {"adapter": settings},
        "lit_align": sound["lit_align"] | {"adapter": {"layers": ["q_proj"]}},
    }
    torch.save(content, tmp_path / "x.ckpt")
    with little_memory(), pytest.raises(TrainingError, match=message):
        export(str(tmp_path / "out"), checkpoint=str(tmp_path / "x.ckpt"))
