"""Parameters of a model folder, read from its safetensors a part of a tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lit_align.config_limits import check_config_file
from lit_align.errors import LocalizationError, ModelError
from lit_align.language_model import UNUSABLE, pretrained
from lit_align.masks import named_shapes
from lit_align.shards import FlatTensors
from lit_align.stored_tensors import StoredTensor, tensors_of_folder

_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


class StoredParameters:
    """The tensors of a model folder under the names of the model's own parameters.

    Where the folder's keys and shapes are not the parameters' (transformers joins the experts of a
    mixture, adds a missing prefix, or a tied tensor was stored under its other name), the folder is
    loaded through transformers, which holds the converted model in memory as long as this object
    lives; else nothing but what is read.

    Args:
        folder: a Hugging Face folder, sharded or not.
        shapes: name -> shape of the model's parameters.

    Attributes:
        shapes: name -> shape.
        dtypes: name -> dtype of the stored values.

    Raises:
        ModelError: the folder cannot be read.
        LocalizationError: a parameter is not in it, has another shape, or is not stored as floats.
    """

    def __init__(self, folder: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.folder = Path(folder)
        self.shapes = dict(shapes)
        self._stored: dict[str, StoredTensor] = {}
        self._open: dict[Path, Any] = {}
        self._loaded: dict[str, Tensor] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        stored = tensors_of_folder(self.folder)
        if all(n in stored and tuple(stored[n].shape) == shape for n, shape in shapes.items()):
            self._stored = {name: _checked(stored[name]) for name in shapes}
            self.dtypes = {name: _FLOATS[entry.dtype] for name, entry in self._stored.items()}
        else:
            self._loaded = _load_converted(self.folder, shapes)
            self.dtypes = {name: tensor.dtype for name, tensor in self._loaded.items()}

    def read(self, name: str) -> Tensor:
        """One parameter in fp32, a copy that the caller may write to.

        Raises:
            ModelError: the file cannot be read.
        """
        shape = self.shapes[name]
        return self.part(name, 0, math.prod(shape)).reshape(shape)

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Flat positions [start, stop) of one parameter in fp32, a copy as `read` gives it.

        They are read, not mapped: what was mapped would count as this process's memory.

        Raises:
            ModelError: the file cannot be read.
        """
        if name in self._loaded:
            return self._loaded[name].reshape(-1)[start:stop].to(torch.float32, copy=True)
        entry, dtype = self._stored[name], self.dtypes[name]
        values = torch.empty(stop - start, dtype=dtype)
        begin = entry.begin + start * dtype.itemsize
        buffer: Any = memoryview(values.view(torch.uint8).numpy())  # type: ignore[arg-type]
        try:
            with entry.file.open("rb", buffering=0) as file:
                file.seek(begin)
                while buffer:
                    if not (count := file.readinto(buffer)):
                        raise ModelError(f"{entry.file}: {name!r} is cut off")
                    buffer = buffer[count:]
        except OSError as error:
            raise ModelError(f"{entry.file}: cannot read {name!r}: {error}") from error
        return values.to(torch.float32)

    def read_rows(self, name: str, start: int, count: int, axis: int = 0) -> Tensor:
        """Some rows of a parameter as they are stored, and nothing else of it; not to be written.

        The file stays open, so that reading a model row by row does not parse its header each time.

        Args:
            name: a 2-D parameter.
            start: first row.
            count: how many.
            axis: 1 where a row is a column.

        Raises:
            ModelError: the file cannot be read.
        """
        rows = slice(start, start + count)
        at = (rows,) if axis == 0 else (slice(None), rows)
        if name in self._loaded:
            return self._loaded[name][at]
        path = self._stored[name].file
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt")
            return self._open[path].get_slice(name)[at]
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: cannot read {name!r}: {error}") from error


class ParametersInMemory:
    """Parameters to be read as `StoredParameters` are.

    Args:
        parameters: name -> parameter.
        shapes: name -> shape of those that are given flat (unevenly sharded ones have no other
            view); default their own.

    Attributes:
        shapes: name -> shape.
        dtypes: name -> dtype.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.shapes = named_shapes(parameters) | dict(shapes or {})
        self.dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
        self._flat = FlatTensors(parameters)

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Flat positions [start, stop) of one parameter in fp32, on the CPU; not to be written."""
        return self._flat.part(name, start, stop).to("cpu", torch.float32)


Parameters = nn.Module | Mapping[str, Tensor] | ParametersInMemory | str | Path
OpenParameters = StoredParameters | ParametersInMemory


def open_parameters(parameters: Parameters) -> OpenParameters:
    """The parameters of a model, of a mapping name -> parameter, or of a model folder.

    Raises:
        ModelError: the folder cannot be read.
        LocalizationError: its weights are not stored as floats.
    """
    if isinstance(parameters, str | Path):
        return StoredParameters(parameters, parameter_shapes(parameters))
    if isinstance(parameters, nn.Module):
        parameters = dict(parameters.named_parameters())
    if isinstance(parameters, ParametersInMemory):
        return parameters
    return ParametersInMemory(parameters)


def parameter_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the parameters that a folder's model has, without loading it.

    Raises:
        ModelError: the folder has no config of a causal language model.
    """
    return named_shapes(meta_model(folder))


def meta_model(folder: str | Path) -> Any:
    """A folder's model on the meta device: its modules and shapes, without its values.

    Raises:
        ModelError: the folder has no config of a causal language model.
    """
    from transformers import AutoModelForCausalLM

    config = read_config(folder)
    try:
        with torch.device("meta"):
            # Every architecture has this attention, and a config may not name another program's.
            return AutoModelForCausalLM.from_config(
                config, attn_implementation="eager", trust_remote_code=False
            )
    except UNUSABLE as error:
        raise ModelError(f"{folder}: no config of a causal language model: {error}") from error


def read_config(folder: str | Path) -> Any:
    """The config of a model folder.

    Raises:
        ModelError: there is none that can be read.
    """
    from transformers import AutoConfig

    check_config_file(folder)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except UNUSABLE as error:
        raise ModelError(f"{folder}: no config of a causal language model: {error}") from error


def stored_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors in a folder's safetensors, blocks in the order of their numbers.

    The names are those of the files, which need not be those of the model's parameters.

    Raises:
        ModelError: the folder has no safetensors, or a file is damaged.
    """
    found = tensors_of_folder(folder)
    return {name: tuple(found[name].shape) for name in sorted(found, key=_by_number)}


def _by_number(name: str) -> list[tuple[bool, int, str]]:
    """So that layers.10 comes after layers.9."""
    return [(p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in name.split(".")]


def _checked(entry: StoredTensor) -> StoredTensor:
    if entry.dtype not in _FLOATS:
        raise LocalizationError(
            f"{entry.file.parent}: {entry.name!r} is stored as {entry.dtype}, not as floats"
        )
    return entry


def _load_converted(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    model = pretrained(folder, dtype="auto")
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, shape in shapes.items():
        if name not in parameters:
            raise LocalizationError(f"{folder} has no parameter {name!r}")
        if tuple(parameters[name].shape) != shape:
            raise LocalizationError(
                f"{name!r} has shape {tuple(parameters[name].shape)} in {folder}, not {shape}"
            )
        if parameters[name].dtype not in _FLOATS.values():
            raise LocalizationError(
                f"{folder}: {name!r} is stored as {parameters[name].dtype}, not as floats"
            )
    return {name: parameters[name] for name in shapes}
