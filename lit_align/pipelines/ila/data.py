"""The rows of an ILA run, and the layers of its model: what every later stage reads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lit_align.data import PreferenceDataModule, SFTDataModule
from lit_align.errors import DataError
from lit_align.language_model import load_language_model
from lit_align.localizers.same_model import check_same_architecture, check_same_tokenizer
from lit_align.masks import named_shapes
from lit_align.masks.linear_layers import linear_layers
from lit_align.pipelines.ila.run import ILARun
from lit_align.pipelines.rows import Row, as_ids, read_json, write_json, write_jsonl
from lit_align.pipelines.training import inference_device
from lit_align.pipelines.variants import data_module

LAYERS_FILE = "layers.json"
LAYERS = {"base_fingerprint": str, "names": [str], "shapes": {str: [int]}}


def prepare_rows(run: ILARun, folder: Path) -> None:
    """Tokenise every file once and split it once; the rows are written as token ids.

    Raises:
        DataError: the rows of a training are fewer than one of its batches.
    """
    validation: list[Row] = []
    counts: dict[str, int] = {}
    for name, file in run.files.items():
        (folder / name).mkdir()
        rows = _read(run, file, folder / name)
        counts[file] = len(rows.rows("train"))
        write_jsonl(folder / name / "train.jsonl", map(as_ids, rows.rows("train")))
        if file not in run.data.train_files:
            continue
        if not (validation and run.data.validation_files):  # given files are every file's
            validation += map(as_ids, rows.rows("validation"))
    _check_batches(run, counts)
    write_jsonl(folder / "validation.jsonl", validation)


def _read(run: ILARun, file: str, folder: Path) -> SFTDataModule | PreferenceDataModule:
    data = dataclasses.replace(run.data, train_files=(file,), search_files=())
    try:
        return data_module(data, str(run.base), run.use, run.machine, folder)
    except DataError as error:
        raise DataError(f"{file}: {error}") from error


def _check_batches(run: ILARun, counts: dict[str, int]) -> None:
    """Check that what is trained on together (file → train rows) is a batch at least."""
    trainings = [("use", run.use.batch_size, run.data.train_files)]
    for dataset, names in run.datasets.items() if run.stage1.enabled else ():
        files = tuple(run.files[name] for name in names)
        if dataset in run.fine_tuned:
            trainings.append(("stage1", run.stage1.batch_size, files))
        trainings.append(("stage2", run.stage2.batch_size, files))
    for group, size, files in trainings:
        rows = sum(counts[file] for file in files)
        if rows < size:
            raise DataError(
                f"{' and '.join(files)}: {rows} train row(s), less than one batch of "
                f"{group}.batch_size {size}: give more rows, or a smaller batch"
            )


@dataclasses.dataclass(frozen=True)
class Layers:
    """What masks are made of without the model.

    Attributes:
        base_fingerprint: of the model.
        names: its linear layers, in order, the head last.
        shapes: of every parameter.
    """

    base_fingerprint: str
    names: list[str]
    shapes: dict[str, Any]

    @classmethod
    def read(cls, run: ILARun) -> Layers:
        """What `list_layers` wrote."""
        found = read_json(run.output / "layers" / LAYERS_FILE, LAYERS)
        return cls(**{name: found[name] for name in LAYERS})


def list_layers(run: ILARun, folder: Path) -> None:
    """Write down the model's linear layers; find out early what would fail later.

    Raises:
        LocalizationError: a given change comes with another tokenizer, or is a model of another
            architecture.
        ModelError: QLoRA is asked for, and NF4 weights cannot be had here.
    """
    if run.use.method == "qlora":
        load_language_model(run.base, nf4_on=inference_device(run.machine.accelerator))
    model: Any = load_language_model(run.base)[0]
    for change in map(Path, run.stage1.change if run.stage1.enabled else ()):
        check_same_tokenizer(run.base, change)
        if (change / "config.json").is_file():
            check_same_architecture(run.base, model, change)
    layers = Layers(model.base_fingerprint, list(linear_layers(model)), named_shapes(model))
    write_json(folder / LAYERS_FILE, dataclasses.asdict(layers))
