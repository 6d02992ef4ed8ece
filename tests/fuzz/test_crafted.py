"""Files as somebody would write them who means harm, one at a time."""

import json
import os
import resource
import struct

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_align.compact.adapter_files import load_adapters, save_adapters
from lit_align.compact.adapters import AdapterSettings, add_adapters
from lit_align.compact.delta import Delta, export_delta
from lit_align.data.bad_rows import BadRows
from lit_align.data.files import read_rows
from lit_align.errors import DataError, DeltaError, LitAlignError, MaskError, ModelError
from lit_align.language_model import fingerprint, load_language_model, load_tokenizer
from lit_align.localizers.stored import meta_model, stored_shapes
from lit_align.masks import ParameterMask, Selection, io
from lit_align.masks.convert import ModelNames, read_allo
from lit_align.masks.packed_parts import packed_parts
from lit_align.modules.checkpointed import read_checkpoint
from lit_align.pipelines.manifest import is_inside
from lit_align.stored_tensors import stored_tensors
from lit_align.strict_json import parse_json
from tests.tiny_models import save_tiny_model, tiny_model

MIB = 1 << 20


def write_mask(path, parameters, tensors):
    """A mask's file that is right in all that its document does not say."""
    document = {"metadata": {}, "parameters": parameters, "digest": "0" * 64}
    document["checksum"] = io._checksum(document)
    save_file(tensors, path, {io._KEY: json.dumps(document)})


def write_header(path, header: dict | bytes, data: bytes = b""):
    """A safetensors file with any header."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ---- sizes before allocation ---------------------------------------------------------------------

ROWS = {"w": torch.tensor([0, 7], dtype=torch.int32)}


@pytest.mark.parametrize(
    ("shape", "axis", "message"),
    [
        ([2**20, 2**20], 0, "no model has"),  # a terabyte of rows
        ([2**20, 2**20], 1, "no model has"),
        ([8, 2**30], 0, "no model has"),  # hours of them
        ([2**40], 0, "no model has"),
        ([2**22], 0, "has no rows"),  # and so no reason to list its entries
        ([2**63, 2**63], 0, "no model has"),
        ([1] * 40, 0, "malformed"),
    ],
)
def test_a_mask_of_a_kilobyte_takes_no_terabyte(tmp_path, shape, axis, message):
    before = peak_mib()
    parameter = {"name": "w", "kind": "rows", "shape": shape, "axis": axis}
    write_mask(tmp_path / "mask", [parameter], ROWS)
    with pytest.raises(MaskError, match=message):
        ParameterMask.load(tmp_path / "mask")
    assert peak_mib() - before < 64


def test_whole_parameters_of_any_size_are_counted_not_listed(tmp_path):
    parameter = {"name": "w", "kind": "all", "shape": [2**31, 2**30], "axis": 0}
    write_mask(tmp_path / "mask", [parameter], {})
    with pytest.raises(MaskError, match="not the one that was saved"):
        ParameterMask.load(tmp_path / "mask")


@pytest.mark.parametrize("shape", [(40, 9), (3, 1000), (5, 4, 6)])
@pytest.mark.parametrize("part", [8, 64, 256, 1 << 22])
def test_rows_are_packed_in_parts_as_at_once(shape, part):
    for axis in (0, 1) if len(shape) == 2 else (0,):
        units = shape[1] if axis else torch.Size(shape[:-1]).numel()
        for rows in ([0], [units - 1], list(range(0, units, 2))):
            selection = Selection("rows", shape, axis, rows=torch.tensor(rows))
            parts = [p.tobytes() for p in packed_parts(selection, part)]
            assert b"".join(parts) == selection.packed().tobytes()


def test_a_header_that_claims_terabytes_is_not_read(tmp_path):
    before = peak_mib()
    path = tmp_path / "model.safetensors"
    for claim in (2**30, 2**40, 2**63):
        with path.open("wb") as file:
            file.write(struct.pack("<Q", claim))
            file.truncate(2**31)  # a hole: it takes no room
        with pytest.raises(ModelError, match="header"):
            stored_tensors(path)
    write_header(path, {"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})
    with pytest.raises(ModelError, match="'w' does not fit in it"):
        fingerprint(tmp_path)
    assert peak_mib() - before < 64


# ---- one file, two readings ----------------------------------------------------------------------

ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b'{"w":%s,"w":%s}' % ((json.dumps(ONE).encode(),) * 2), 4, "there twice"),
        ({"w": ONE, "v": ONE}, 4, "does not begin where another ends"),
        ({"w": ONE | {"data_offsets": [4, 8]}}, 8, "does not begin where another ends"),
        ({"w": ONE}, 8, "belong to no tensor"),
        ({"w": ONE | {"shape": [2]}}, 4, "not the size of its shape"),
        ({"w": ONE | {"shape": [-1, -1]}}, 4, "has the shape"),
        ({"w": ONE | {"dtype": "F31"}}, 4, "dtype 'F31'"),
        ({"w": ONE | {"dtype": ["F32"]}}, 4, "dtype"),
        ({"w": ONE | {"data_offsets": [0.0, 4.0]}}, 4, "has the place"),
        ({"w": ONE, "__metadata__": {"a": {}}}, 4, "metadata"),
        (b"[" * 100_000, 0, "deep"),
        (b"[]", 0, "no object"),
        (b'{"\xff": 1}', 0, "utf-8"),
    ],
)
def test_a_header_that_contradicts_itself(tmp_path, header, data, message):
    write_header(tmp_path / "model.safetensors", header, bytes(data))
    with pytest.raises(ModelError, match=message):
        stored_shapes(tmp_path)


def test_a_tensor_in_two_shards(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"w": torch.ones(2)}, tmp_path / name)
    index = {"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="both have 'w'"):
        fingerprint(tmp_path)


# ---- names that lead out -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/secret.safetensors", "..", ".", "", "sub/x.safetensors",
     "pickle.bin", "..\\x.safetensors", "\x1b[2J.safetensors", 5, None, ["a"]],
)  # fmt: skip
def test_an_index_names_files_of_its_folder_alone(tmp_path, name):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / "secret.safetensors", folder / "sub" / "x.safetensors"):
        save_file({"w": torch.ones(2)}, path)
    (folder / "pickle.bin").write_bytes((tmp_path / "secret.safetensors").read_bytes())
    index = {"weight_map": {"w": name}, "metadata": {}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"index\.json") as error:
        fingerprint(folder)
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "/a", "../a", "a/../b", "a//b", "a/", "C:/a", "a\\b", "a\0b", "a\x1bb",
             "\ud800", "a" * 300, "a/" * 600 + "b"],
)  # fmt: skip
def test_a_manifest_names_files_of_its_stage_alone(name):
    assert not is_inside(name)
    assert is_inside("a/b.txt") and is_inside("é b")


@pytest.mark.parametrize("name", ["../outside.arrow", "/etc/passwd"])
def test_saved_rows_name_files_of_their_folder_alone(tmp_path, name):
    folder = tmp_path / "rows"
    datasets.Dataset.from_list([{"prompt": "secret"}]).save_to_disk(folder)
    (folder / "data-00000-of-00001.arrow").rename(tmp_path / "outside.arrow")
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"] = [{"filename": name}]
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match="leads out of its folder"):
        list(read_rows(folder, BadRows()))


# ---- code ----------------------------------------------------------------------------------------


class Payload:
    """Pickled, it makes a folder where it is unpickled."""

    def __init__(self, flag):
        self.flag = str(flag)

    def __reduce__(self):
        return os.mkdir, (self.flag,)


def test_pickles_run_nothing(tmp_path):
    flag, path = tmp_path / "it ran", tmp_path / "file"
    torch.save({"state_dict": {}, "global_step": 0, "hyper_parameters": Payload(flag)}, path)
    with pytest.raises(LitAlignError, match="file"):
        read_checkpoint(path)
    torch.save({"model.norm.weight": Payload(flag)}, path)
    with pytest.raises(MaskError, match="may be code"):
        read_allo(path, ModelNames.of_model(tiny_model()))
    assert not flag.exists()
    torch.load(path, weights_only=False)  # as it would have been
    assert flag.exists()


def test_a_folder_with_code_of_its_own_runs_nothing(tmp_path, monkeypatch):
    folder, flag = save_tiny_model(tmp_path / "model"), tmp_path / "it ran"
    code = f"import os\nos.mkdir({str(flag)!r})\n"
    for name in ("config", "model", "tokenizer"):
        (folder / f"{name}.py").write_text(code)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # nobody is asked, either
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unknown", "auto_map": {
        "AutoConfig": "config.Config", "AutoModelForCausalLM": "model.Model",
    }}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Unknown", "auto_map": {"AutoTokenizer": ["tokenizer.T", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for read in (load_language_model, meta_model):
        with pytest.raises(ModelError):
            read(folder)
    assert not flag.exists()


# ---- numbers -------------------------------------------------------------------------------------


def test_a_model_without_one_of_its_tensors_is_not_made_up(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        load_language_model(folder)


def test_a_model_of_other_shapes_than_its_config(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for change in ({"intermediate_size": 57}, {"num_hidden_layers": 2**31}, {"hidden_size": "x"}):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ModelError):
            load_language_model(folder)


def test_values_that_are_no_numbers(tmp_path):
    model = tiny_model()
    name = "model.norm.weight"
    selections = {n: Selection.none(p.shape) for n, p in model.named_parameters()}
    mask = ParameterMask(selections | {name: Selection.all((32,))})
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(DeltaError, match=f"{name}.*not all finite"):
        export_delta(model, tmp_path / "delta", mask)


@pytest.mark.parametrize(
    "settings",
    [{"lora_alpha": "16"}, {"lora_alpha": None}, {"use_rslora": 1}, {"init_r": 0}, {"init_r": 1.5},
     {"peft_type": ["LORA"]}, {"bias": {"all": 1}}],
)  # fmt: skip
def test_adapters_with_settings_of_other_types(tmp_path, settings):
    model = tiny_model()
    add_adapters(model, AdapterSettings(rank=2, layers=["q_proj"]))
    folder = save_adapters(model, tmp_path / "adapters")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(ModelError, match=r"adapter"):
        load_adapters(folder, tiny_model())


@pytest.mark.parametrize("spoil", [lambda t: t[:0], lambda t: t * float("nan"), lambda t: t.int()])
def test_adapters_without_rank_and_with_no_numbers(tmp_path, spoil):
    model = tiny_model()
    add_adapters(model, AdapterSettings(rank=2, layers=["q_proj"]))
    folder = save_adapters(model, tmp_path / "adapters")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors = {
        n: spoil(t.T).T.contiguous() if "lora_B" in n else spoil(t) for n, t in tensors.items()
    }
    save_file(tensors, path)
    with pytest.raises(ModelError, match="adapters"):
        load_adapters(folder, tiny_model())


def test_a_delta_and_a_mask_do_not_stand_for_each_other(tmp_path):
    ParameterMask.full({"w": (2, 2)}).save(tmp_path / "mask")
    with pytest.raises(DeltaError, match="needs 4 values"):
        Delta.load(tmp_path / "mask")


# ---- JSON ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1, "a": 2}', "'a' is there twice"),
        (b"NaN", "no finite"),
        (b"[1e999]", "no finite"),
        (b"-Infinity", "no finite"),
        (b"18446744073709551616", "too large"),
        (b"9" * 100_000, "too large"),
        (b"[" * 65 + b"]" * 65, "64 deep"),
        (b"[" * 10**6, "64 deep"),
        (b"\xff", "utf-8"),
        (b"", "Expecting value"),
    ],
)
def test_json_that_others_would_read_otherwise_or_not_at_all(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_json_as_it_should_be():
    value = {"a": [1, -2.5, None, True, "é\n", 2**64 - 1], "b": {"c": {}}}
    assert parse_json(json.dumps(value)) == value == parse_json(json.dumps(value).encode())


def test_a_message_acts_on_no_terminal():
    error = DataError("row \x1b[2J\x07 \ud800\nnext é")
    assert str(error) == r"row \x1b[2J\x07 \ud800" + "\nnext é"


def test_a_tokenizer_that_is_none(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    for text in ("{}", "[]", '{"model": {"type": "BPE"}}', "x"):
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises(ModelError, match="tokenizer"):
            load_tokenizer(folder)
