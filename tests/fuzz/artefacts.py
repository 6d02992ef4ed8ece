"""One good file of every kind that is read, with its reader and the ways to spoil it."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save

from lit_align.compact import delta
from lit_align.compact.adapter_files import load_adapters, save_adapters
from lit_align.compact.adapters import AdapterSettings, add_adapters
from lit_align.compact.delta import apply_delta, export_delta
from lit_align.data import RowTokenizer
from lit_align.data.bad_rows import BadRows
from lit_align.data.loading import RowLoader
from lit_align.data.schema import PreferenceRow
from lit_align.evaluation.conversations import Question
from lit_align.language_model import fingerprint, load_tokenizer
from lit_align.localizers.layer_gate import LayerScores, layer_gate_mask, read_scores
from lit_align.localizers.stored import StoredParameters, parameter_shapes
from lit_align.masks import ParameterMask, Selection, io, named_shapes
from lit_align.masks.convert import ModelNames, mask_of_targets, read_allo, read_targets, write_allo
from lit_align.modules import reference_store
from lit_align.modules.checkpointed import read_checkpoint
from lit_align.modules.reference_store import ReferenceStore, sequence_digest
from lit_align.pipelines.generation.answer_file import AnswerFile
from lit_align.pipelines.generation.questions import AskedQuestion
from lit_align.pipelines.manifest import load_manifest
from lit_align.pipelines.rows import PAIR, read_jsonl, write_jsonl
from lit_align.pipelines.stage import Stage, run_stages
from lit_align.planning.model_configs import read_config, weightless_model
from lit_align.report.figures import read_metrics_csv
from tests.fuzz.mutations import (
    Mutation,
    damaged,
    other_header,
    other_json,
    other_lines,
    other_record,
)
from tests.tiny_models import tiny_model, tiny_tokenizer

KEY = {"model": "a" * 64, "delta": None}
ROW = {
    "prompt": [{"role": "user", "content": "How many apples?"}],
    "chosen": [{"role": "assistant", "content": "The answer is: 7"}],
    "rejected": [{"role": "assistant", "content": "8"}],
    "chosen_token_weights": None,
}


@dataclasses.dataclass
class Artefact:
    """A file, what reads it and uses what was read, and how it is spoiled."""

    path: Path
    read: Callable[[], object]
    mutations: tuple[Mutation, ...]


class EverySequence:
    """Wants them all."""

    def __contains__(self, digest: object) -> bool:
        return True


class Artefacts:
    """All kinds, by name; each is made in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny_model()
        self.shapes = named_shapes(self.model)
        self.names = ModelNames.of_model(self.model)
        tokenizer = RowTokenizer(tiny_tokenizer(), 64)
        self.loader = RowLoader(PreferenceRow, tokenizer)

    def mask(self) -> Artefact:
        selections = {name: Selection.none(shape) for name, shape in self.shapes.items()}
        rows, columns, elements = (n for n, s in list(self.shapes.items())[1:4] if len(s) == 2)
        selections[rows] = Selection.of_rows(self.shapes[rows], torch.tensor([0, 2, 5]))
        selections[columns] = Selection.of_rows(self.shapes[columns], torch.tensor([1]), axis=1)
        selections[elements] = Selection.of_dense(torch.rand(self.shapes[elements]) < 0.1)
        path = self.folder / "mask.safetensors"
        ParameterMask(selections).save(path)

        def read() -> None:
            mask = ParameterMask.load(path)
            mask.check_matches(self.shapes)
            for name, selection in mask.selections.items():
                if selection.count():
                    mask.entries(name)

        return Artefact(path, read, (damaged, other_header, *FORGED))

    def delta(self) -> Artefact:
        mask = ParameterMask.load(self.mask().path)
        path = self.folder / "delta.safetensors"
        export_delta(self.model, path, mask)
        victim = tiny_model(seed=1)
        return Artefact(path, lambda: apply_delta(victim, path), (damaged, other_header, *FORGED))

    def public_mask(self) -> Artefact:
        path = self.folder / "allo.bin"
        write_allo(ParameterMask.load(self.mask().path), path)
        return Artefact(path, lambda: read_allo(path, self.names), (damaged, other_record))

    def targets(self) -> Artefact:
        path = self.folder / "targets.json"
        path.write_text(json.dumps({"target_modules": ["q_proj", "v_proj"]}))
        read = lambda: mask_of_targets(read_targets(path), self.names)  # noqa: E731
        return Artefact(path, read, (damaged, other_json))

    def reference_logps(self) -> Artefact:
        store = ReferenceStore(self.folder / "cache", KEY)
        store.names()
        ids = [np.arange(n, dtype=np.int32) for n in range(1, 5)]
        digests = [sequence_digest(each, each) for each in ids]
        logps = {d: -np.ones(n + 1, np.float32) for n, d in enumerate(digests)}
        path = store.folder / store.write(logps)
        read = lambda: store.read(path.name, EverySequence())  # noqa: E731
        return Artefact(path, read, (damaged, other_header, other_tensor, signed(other_tensor)))

    def manifest(self) -> Artefact:
        output = self.folder / "run"
        stages = [
            Stage("one", {"a": [1, "x"]}, [], lambda folder: (folder / "f").write_text("x")),
            Stage("two", {}, ["one"], lambda folder: (folder / "g").write_text("y")),
        ]
        run_stages(stages, output, log=lambda line: None)

        def read() -> None:
            for name, record in load_manifest(output).stages.items():
                record.damage(output / name)
            run_stages(stages, output, log=lambda line: None)

        return Artefact(output / "manifest.json", read, (damaged, other_json, other_json))

    def layer_scores(self) -> Artefact:
        layers = {n: float(i) for i, n in enumerate(self.names.modules)}
        path = LayerScores(layers, "ab", unscored=("head",)).write(self.folder / "scores.json")
        read = lambda: layer_gate_mask(read_scores(path), self.shapes, 0.5)  # noqa: E731
        return Artefact(path, read, (damaged, other_json, other_json))

    def _adapters(self, file: str, *mutations: Mutation) -> Artefact:
        model = tiny_model()
        add_adapters(model, AdapterSettings(rank=2, layers=["q_proj"]))
        folder = save_adapters(model, self.folder / f"adapters_{file}")
        return Artefact(folder / file, lambda: load_adapters(folder, self.model), mutations)

    def adapter_config(self) -> Artefact:
        return self._adapters("adapter_config.json", damaged, other_json)

    def adapter_weights(self) -> Artefact:
        return self._adapters("adapter_model.safetensors", damaged, other_header, other_header)

    def adapter_origin(self) -> Artefact:
        return self._adapters("lit_align.json", damaged, other_json)

    def _model(self, file: str, read: Callable[[Path], object], *mutations: Mutation) -> Artefact:
        folder = self.folder / f"model_{file}"
        shard = "20KB" if file.endswith("index.json") else "1GB"
        self.model.save_pretrained(folder, max_shard_size=shard)
        tiny_tokenizer().save_pretrained(folder)
        return Artefact(folder / file, lambda: read(folder), mutations)

    def _read_stored(self, folder: Path) -> None:
        fingerprint(folder)
        stored = StoredParameters(folder, self.shapes)
        for name in self.shapes:
            stored.read(name)

    def model_weights(self) -> Artefact:
        return self._model("model.safetensors", self._read_stored, other_header, damaged)

    def model_index(self) -> Artefact:
        file = "model.safetensors.index.json"
        return self._model(file, self._read_stored, damaged, other_json, other_json)

    def model_config(self) -> Artefact:
        return self._model("config.json", parameter_shapes, damaged, other_json, other_json)

    def planned_config(self) -> Artefact:
        def read(folder: Path) -> None:
            with torch.device("meta"):
                weightless_model(read_config(str(folder / "config.json")), torch.float32)

        return self._model("config.json", read, damaged, other_json, other_json)

    def tokenizer(self) -> Artefact:
        return self._model("tokenizer.json", load_tokenizer, damaged, other_json)

    def tokenizer_config(self) -> Artefact:
        return self._model("tokenizer_config.json", load_tokenizer, damaged, other_json)

    def checkpoint(self) -> Artefact:
        path = self.folder / "last.ckpt"
        state = {"language_model.x": torch.randn(40), "language_model.y": torch.ones(3, 2)}
        rest = {"global_step": 3, "hyper_parameters": {"lr": 0.1}, "lit_align": {"adapter": None}}
        torch.save({"state_dict": state, "optimizer_states": [], **rest}, path)

        def read() -> None:
            for tensor in read_checkpoint(path)["state_dict"].values():
                if isinstance(tensor, torch.Tensor) and tensor.numel() < 1000:
                    tensor.double().sum()

        return Artefact(path, read, (damaged, other_record, other_record))

    def _rows(self, suffix: str, write: Callable[[Path], None], *mutations: Mutation) -> Artefact:
        path = self.folder / f"rows{suffix}"
        write(path)
        return Artefact(path, lambda: self._read_rows(path), mutations)

    def _read_rows(self, path: Path) -> None:
        """As a data module does that skips bad rows, and writes them down."""
        bad_rows = BadRows()
        self.loader.from_files([path], bad_rows)
        bad_rows.write(self.folder)
        bad_rows.raise_if_any()

    def jsonl(self) -> Artefact:
        lines = (json.dumps(ROW) + "\n") * 4
        return self._rows(".jsonl", lambda p: p.write_text(lines), damaged, other_lines)

    def json(self) -> Artefact:
        text = json.dumps([ROW] * 3)
        return self._rows(".json", lambda p: p.write_text(text), damaged, other_json)

    def csv(self) -> Artefact:
        text = 'prompt,chosen,rejected\nWhy?,because,"no, ""not"""\nA?,b,c\n'
        return self._rows(".csv", lambda p: p.write_text(text), damaged)

    def parquet(self) -> Artefact:
        def write(path: Path) -> None:
            import datasets

            datasets.Dataset.from_list([ROW] * 4).to_parquet(path)

        return self._rows(".parquet", write, damaged)

    def _saved_rows(self, file: str, *mutations: Mutation) -> Artefact:
        import datasets

        folder = self.folder / f"saved_{file}"
        datasets.Dataset.from_list([ROW] * 4).save_to_disk(folder)
        path = folder / file
        return Artefact(path, lambda: self._read_rows(folder), mutations)

    def saved_rows(self) -> Artefact:
        return self._saved_rows("data-00000-of-00001.arrow", damaged)

    def saved_state(self) -> Artefact:
        return self._saved_rows("state.json", damaged, other_json)

    def saved_info(self) -> Artefact:
        return self._saved_rows("dataset_info.json", damaged, other_json)

    def dataset_dict(self) -> Artefact:
        import datasets

        folder = self.folder / "saved_splits"
        datasets.DatasetDict(train=datasets.Dataset.from_list([ROW] * 4)).save_to_disk(folder)
        read = lambda: self._read_rows(folder)  # noqa: E731
        return Artefact(folder / "dataset_dict.json", read, (damaged, other_json))

    def metrics(self) -> Artefact:
        path = self.folder / "metrics.csv"
        path.write_text("epoch,loss,step\n0,0.5,1\n,,2\n0,0.25,3\n")
        return Artefact(path, lambda: read_metrics_csv(path), (damaged,))

    def stage_rows(self) -> Artefact:
        path = self.folder / "pairs.jsonl"
        write_jsonl(path, [{"id": "a", "prompt": "b", "chosen": "c", "rejected": "d"}] * 3)
        return Artefact(path, lambda: read_jsonl(path, PAIR), (damaged, other_lines))

    def answers(self) -> Artefact:
        question = Question("1", ("How many?",))
        path, settings = self.folder / "answers.json", {"name": "x", "seed": 0}
        asked = [AskedQuestion(question, 1, "How many?", "data", None)]
        AnswerFile(path, "alpaca_eval", settings, asked).add({0: [["7"]]})
        read = lambda: AnswerFile(path, "alpaca_eval", settings, asked)  # noqa: E731
        return Artefact(path, read, (damaged, other_json))


KINDS = tuple(name for name in vars(Artefacts) if not name.startswith("_"))


def _rebuilt(data: bytes, header: dict) -> bytes:
    new = json.dumps(header).encode()
    return len(new).to_bytes(8, "little") + new + data[8 + int.from_bytes(data[:8], "little") :]


def _header(data: bytes) -> dict:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def other_document(data: bytes, source: random.Random) -> bytes:
    """A mask or delta with another document; its checksum is left to `signed`."""
    header = _header(data)
    text = other_json(header["__metadata__"][io._KEY].encode(), source)
    header["__metadata__"][io._KEY] = text.decode("utf-8", "replace")
    return _rebuilt(data, header)


def other_tensor(data: bytes, source: random.Random) -> bytes:
    """A safetensors file of ours in which one sound tensor stands for another."""
    tensors, metadata = load(data), _header(data)["__metadata__"]
    name = source.choice(sorted(tensors))
    flat = tensors[name].reshape(-1).clone()
    kinds = [
        lambda: flat.flip(0),
        lambda: flat[:-1],
        lambda: torch.cat([flat, flat]),
        lambda: flat[None],
        lambda: flat.double(),
        lambda: flat.to(torch.int16),
        lambda: flat * 0 - 1,
        lambda: flat * 0 + 127,
        lambda: flat[:0],
        lambda: torch.zeros_like(flat),
    ]
    tensors[name] = source.choice(kinds)().contiguous()
    if source.random() < 0.1:
        tensors[source.choice(["x", "", "values.x", "../x"])] = tensors.pop(name)
    return save(tensors, metadata)


def signed(mutation: Mutation) -> Mutation:
    """The mutation, with digests and checksums made right again where that can be done."""

    def mutate(data: bytes, source: random.Random) -> bytes:
        data = mutation(data, source)
        try:
            header = _header(data)
            metadata, tensors = header["__metadata__"], load(data)
            if io._KEY in metadata:
                metadata[io._KEY] = _signed_document(json.loads(metadata[io._KEY]), tensors)
            else:
                arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
                metadata["checksum"] = reference_store._checksum(metadata["key"], arrays)
            return _rebuilt(data, header)
        except Exception:  # too far gone to be signed: that, too, is a file to be refused
            return data

    mutate.__name__ = f"signed {mutation.__name__}"
    return mutate


def _signed_document(document: dict, tensors: dict[str, torch.Tensor]) -> str:
    selections = {}
    for entry in document["parameters"]:
        kind, shape, tensor = entry["kind"], entry["shape"], tensors.get(entry["name"])
        if kind == "rows":
            selection = Selection.of_rows(shape, tensor.long(), entry["axis"])
        else:
            selection = Selection(kind, tuple(shape), bitmap=tensor)
        selections[entry["name"]] = selection
    document["digest"] = ParameterMask(selections).digest
    prefix = delta.VALUES_PREFIX
    values = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if values:
        document["metadata"]["extra"][delta.CHECKSUM] = delta._checksum(values)
    del document["checksum"]
    document["checksum"] = io._checksum(document)
    return json.dumps(document)


# Kinds of a careful forger, who leaves no checksum wrong.
FORGED = (other_document, other_tensor, signed(other_document), signed(other_tensor))
