"""Masks from and for other programs: the public ALLO code's dense masks, peft's target modules."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lit_align.errors import MaskError
from lit_align.files import sync_folder, write_atomically
from lit_align.masks import bitmap as bits
from lit_align.masks.granularity import Selection
from lit_align.masks.linear_layers import module_names, output_head
from lit_align.masks.metadata import MaskMetadata
from lit_align.masks.parameter_mask import ParameterMask, named_shapes
from lit_align.strict_json import read_json_file
from lit_align.unpickling import UNREADABLE_PICKLE, check_pickles

CHUNK = 2**22  # entries; a multiple of 8, so that chunks end on a byte of the bitmap
ALL_LINEAR = "all-linear"
NARROWING = (  # fields of an adapter_config.json that say more than the list of modules does
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
)


@dataclasses.dataclass(frozen=True)
class ModelNames:
    """What a model calls its parameters and its linear layers; the values are not read.

    Attributes:
        shapes: parameter -> shape, a tied one once.
        aliases: every name of a parameter, its other names where it is tied included -> the name
            in `shapes`.
        modules: weight of a linear layer -> path of its module (peft's `target_modules`).
        head: the path of the output head, where the model names one.
    """

    shapes: dict[str, tuple[int, ...]]
    aliases: dict[str, str]
    modules: dict[str, str]
    head: str | None

    @classmethod
    def of_model(cls, model: nn.Module) -> ModelNames:
        """Of a model, which may be on the meta device."""
        first = {id(p): name for name, p in model.named_parameters()}
        every = model.named_parameters(remove_duplicate=False)
        head = output_head(model)
        paths = [path for path, module in model.named_modules() if module is head]
        return cls(
            named_shapes(model),
            {name: first[id(p)] for name, p in every},
            module_names(model),
            paths[0] if paths else None,
        )


def write_allo(mask: ParameterMask, path: str | Path) -> None:
    """Write the mask as the public ALLO code reads it: name -> dense bf16 tensor of 0 and 1.

    Takes two bytes an entry of the whole model, in memory too; whole or not at all.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    dense = {name: mask.dense(name).to(torch.bfloat16) for name in mask.selections}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        torch.save(dense, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def read_allo(
    path: str | Path, names: ModelNames, *, base_fingerprint: str | None = None
) -> ParameterMask:
    """A mask that the public ALLO code wrote (`torch.save` of name -> dense tensor of 0 and 1).

    The file is mapped into memory and no code in it is run. A tied parameter may be there under
    each of its names, which must then agree.

    Args:
        path: the file.
        names: of the model that the mask is for.
        base_fingerprint: of that model.

    Raises:
        MaskError: the file is missing, damaged, or a pickle that wants to run code; a name that
            the model does not have, a parameter that the file lacks, another shape, or an entry
            that is neither 0 nor 1.
    """
    path = Path(path)
    selections: dict[str, Selection] = {}
    for name, tensor in _load_tensors(path).items():
        if name not in names.aliases:
            raise MaskError(f"{path}: the model has no parameter {name!r}")
        own = names.aliases[name]
        selection = _selection(path, name, tensor, names.shapes[own])
        if (
            own in selections
            and (selections[own] - selection).count() + (selection - selections[own]).count()
        ):
            raise MaskError(f"{path}: {name!r} and {own!r} are one tied parameter, but differ")
        selections[own] = selection
    for name in names.shapes:
        if name not in selections:
            raise MaskError(f"{path}: lacks {name!r}, which the model has")
    metadata = MaskMetadata(
        "public_allo", base_fingerprint=base_fingerprint, extra={"converted_from": path.name}
    )
    return ParameterMask({name: selections[name] for name in names.shapes}, metadata)


def peft_targets(mask: ParameterMask, names: ModelNames) -> list[str]:
    """The module paths of a mask of whole linear layers, for peft's `target_modules`.

    Raises:
        MaskError: the mask is of another model, selects part of a layer or something that is no
            linear layer, or nothing.
    """
    mask.check_matches(names.shapes)
    for name, selection in mask.selections.items():
        if selection.kind == "none":
            continue
        if name not in names.modules:
            raise MaskError(
                f"the mask selects {name!r}, which is no linear layer: adapters cannot go there"
            )
        if selection.kind != "all":
            raise MaskError(
                f"the mask selects {selection.count() / selection.numel:.2%} of {name!r}: adapters "
                "go to whole layers, so take a mask of granularity layer"
            )
    targets = [names.modules[n] for n, s in mask.selections.items() if s.kind == "all"]
    if not targets:
        raise MaskError("the mask selects no layer")
    return targets


def mask_of_targets(
    targets: Sequence[str] | str, names: ModelNames, *, base_fingerprint: str | None = None
) -> ParameterMask:
    """The mask of the linear layers that peft's `target_modules` name.

    As in peft: each name of a list is a module's whole path or its end after a dot; a string is a
    regular expression for whole paths, or `all-linear`: every linear layer but the head.

    Raises:
        MaskError: a name or expression that no linear layer fits, or a malformed expression.
    """
    chosen = set(_matching(targets, names))
    weights = {name for name, module in names.modules.items() if module in chosen}
    selections = {
        name: Selection.all(shape) if name in weights else Selection.none(shape)
        for name, shape in names.shapes.items()
    }
    metadata = MaskMetadata("peft_targets", "layer", base_fingerprint=base_fingerprint)
    return ParameterMask(selections, metadata)


def write_targets(targets: Sequence[str], path: str | Path, mask: ParameterMask) -> None:
    """Write JSON with `target_modules`, and which mask and base they come from."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "target_modules": list(targets),
        "base_fingerprint": mask.metadata.base_fingerprint,
        "mask_digest": mask.digest,
    }
    write_atomically(path, json.dumps(document, indent=1).encode() + b"\n")


def read_targets(path: str | Path) -> list[str] | str:
    """`target_modules` of a JSON file: one of `write_targets`, or peft's `adapter_config.json`.

    Raises:
        MaskError: no such file or list, or other fields that narrow or widen what is adapted.
    """
    path = Path(path)
    try:
        document: Any = read_json_file(path)
    except (OSError, ValueError) as error:
        raise MaskError(f"{path}: cannot be read as JSON: {error}") from error
    targets: Any = document.get("target_modules") if isinstance(document, dict) else None
    names = [targets] if isinstance(targets, str) else targets
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise MaskError(f"{path}: has no list of names under 'target_modules'")
    for field in NARROWING:
        if document.get(field):
            raise MaskError(
                f"{path}: {field!r} is set too, which a mask of its target_modules would not show"
            )
    return targets


def _load_tensors(path: Path) -> Mapping[str, Tensor]:
    try:
        check_pickles(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise MaskError(
            f"{path}: holds more than tensors, and what else a pickle holds may be code, which is "
            "not run: save a plain dict of name -> tensor"
        ) from error
    except UNREADABLE_PICKLE as error:
        raise MaskError(f"{path}: cannot be read as a file of torch.save: {error}") from error
    if not isinstance(loaded, dict) or not loaded:
        raise MaskError(f"{path}: holds no dict of tensors but {type(loaded).__name__}")
    for name, tensor in loaded.items():
        strided = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        strided = strided and tensor.device.type == "cpu"  # or one without values
        if not isinstance(name, str) or not strided or tensor.is_quantized:
            raise MaskError(f"{path}: {name!r:.80} is no dense tensor under a name")
    return loaded


def _selection(path: Path, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Selection:
    """Check and pack one dense tensor, a chunk at a time."""
    if tuple(tensor.shape) != shape:
        raise MaskError(f"{path}: {name!r} has shape {tuple(tensor.shape)}, in the model {shape}")
    bitmap = np.zeros(bits.num_bytes(tensor.numel()), np.uint8)
    for start, chunk in enumerate(tensor.reshape(-1).split(CHUNK)):
        ones = chunk == 1
        if not bool((ones | (chunk == 0)).all()):
            stray = chunk[~ones & (chunk != 0)][0].item()
            raise MaskError(f"{path}: {name!r} holds {stray}: the entries of a mask are 0 and 1")
        packed = bits.pack(ones.numpy())
        bitmap[start * CHUNK // 8 : start * CHUNK // 8 + len(packed)] = packed
    return Selection.of_bitmap(shape, torch.from_numpy(bitmap))


def _matching(targets: Sequence[str] | str, names: ModelNames) -> list[str]:
    paths = list(names.modules.values())
    if targets == ALL_LINEAR:
        return [path for path in paths if path != names.head]
    if isinstance(targets, str):
        return _fitting(targets, paths)
    found = []
    for target in targets:
        fits = [path for path in paths if path == target or path.endswith(f".{target}")]
        if not fits:
            raise MaskError(f"no linear layer of the model is called {target!r}")
        found += fits
    return found


def _fitting(expression: str, paths: list[str]) -> list[str]:
    try:
        found = [path for path in paths if re.fullmatch(expression, path)]
    except re.error as error:
        raise MaskError(f"{expression!r} is no regular expression: {error}") from error
    if not found:
        raise MaskError(f"{expression!r} fits no linear layer of the model")
    return found
