"""Deltas: the FINAL values of the selected entries, so that apply and merge are bitwise.

On disk a delta is a mask file (see `lit_align.masks`) with a tensor of values beside each
selection, and a checksum of them in the metadata.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from lit_align.compact.state import links, read_back
from lit_align.errors import DeltaError, MaskError
from lit_align.language_model import fingerprint, load_language_model, save_language_model
from lit_align.localizers.stored import StoredParameters
from lit_align.masks import ParameterMask, io, named_shapes
from lit_align.shards import refuse_shards
from lit_align_kernels.entries import Entries
from lit_align_kernels.swap_selected import gather_entries, scatter_selected_

AnyModule = TypeVar("AnyModule", bound=nn.Module)
APPLIED = "lit_align_applied_mask"  # attribute of a model: entries that deltas have changed
VALUES_PREFIX = "values."
CHECKSUM = "delta_values_sha256"


@dataclasses.dataclass(frozen=True)
class Delta:
    """A delta in memory.

    Attributes:
        mask: which entries; its metadata names the base.
        values: parameter name → (M,) values in the order of the mask's entries; names of parameters
            with a selection alone.
    """

    mask: ParameterMask
    values: Mapping[str, Tensor]

    @classmethod
    def load(cls, path: str | Path) -> Delta:
        """Read a delta, trusting nothing in the file.

        Raises:
            DeltaError: the file is missing, damaged, truncated or no delta; names the tensor.
        """
        path = Path(path)
        try:
            mask = ParameterMask.load(path, extra_prefix=VALUES_PREFIX)
            counts = {name: mask.selections[name].count() for name in selected_names(mask)}
            values = io.read_extra(path, VALUES_PREFIX, counts)
        except MaskError as error:
            raise DeltaError(f"not a delta: {error}") from error
        _check_finite(f"{path}: damaged", values)
        if mask.metadata.extra.get(CHECKSUM) != _checksum(values):
            raise DeltaError(f"{path}: damaged: its values are not those that were saved")
        return cls(mask, values)

    @property
    def checksum(self) -> str:
        """SHA-256 of the values."""
        return str(self.mask.metadata.extra[CHECKSUM])


def selected_names(mask: ParameterMask) -> list[str]:
    """Parameters of which the mask selects something."""
    return [name for name, s in mask.selections.items() if s.kind != "none"]


def _check_finite(what: str, values: Mapping[str, Tensor]) -> None:
    for name, of_one in values.items():
        # (NaN is both its least and its greatest value; 20 times as fast as one by one.)
        if len(of_one) and not all(map(torch.isfinite, of_one.aminmax())):
            raise DeltaError(f"{what}: the values of {name!r} are not all finite")


def _checksum(values: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(values):
        sha.update(f"{name} {values[name].dtype} {len(values[name])}\n".encode())
        sha.update(values[name].contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def restricted_mask(model: nn.Module) -> ParameterMask:
    """The mask that a model was restricted to.

    Raises:
        DeltaError: the model is not restricted.
    """
    mask = getattr(model, "lit_align_mask", None)
    if mask is None:
        raise DeltaError("the model is not restricted: name the mask whose entries to export")
    return mask


def changed_mask(model: nn.Module) -> ParameterMask:
    """Entries in which a restricted model may differ from its base, applied deltas included.

    Raises:
        DeltaError: the model is not restricted.
    """
    trained, applied = restricted_mask(model), getattr(model, APPLIED, None)
    return trained if applied is None else applied | trained


def export_delta(model: nn.Module, path: str | Path, mask: ParameterMask | None = None) -> None:
    """Write the model's values at the mask's entries, with the base's fingerprint.

    Args:
        model: a restricted model, or any model with `mask` given.
        path: file to write, whole or not at all.
        mask: entries to export; default those that the model was restricted to and those of the
            deltas applied to it. Entries outside it must hold the base's values for `merge` to give
            this model.

    Raises:
        DeltaError: no mask is known, or a value is NaN or infinite.
        MaskError: the mask belongs to another model.
        ModelError: the model is sharded.
    """
    refuse_shards(model, f"no delta at {path}")
    mask = changed_mask(model) if mask is None else mask
    base = getattr(model, "base_fingerprint", None)
    mask.check_matches(base_shapes(model), base)
    parameters = dict(model.named_parameters())
    values = {
        n: gather_entries(parameters[n].detach(), _entries_on(mask, n, parameters[n])).cpu()
        for n in selected_names(mask)
    }
    _check_finite("not a model to export", values)
    metadata = dataclasses.replace(
        mask.metadata,
        base_fingerprint=mask.metadata.base_fingerprint or base,
        extra=mask.metadata.extra | {CHECKSUM: _checksum(values)},
    )
    extra = {VALUES_PREFIX + n: v for n, v in values.items()}
    io.write(Path(path), mask.selections, metadata, mask.digest, extra)


def _entries_on(mask: ParameterMask, name: str, like: Tensor) -> Entries:
    return mask.entries(name).to(like.device)


def base_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the base's parameters: of a restricted model, without its trainable vectors."""
    vectors = {id(link.selected) for link in links(model) if not link.is_whole}
    return {n: tuple(p.shape) for n, p in model.named_parameters() if id(p) not in vectors}


def apply_delta(model: AnyModule, path: str | Path) -> AnyModule:
    """Write a delta's values into the model, in place; the model remembers which entries.

    Raises:
        DeltaError: the delta is damaged or belongs to another model.
    """
    delta = Delta.load(path)
    _write(model, delta.mask, iter(delta.values.items()), path)
    applied = getattr(model, APPLIED, None)
    setattr(model, APPLIED, delta.mask if applied is None else applied | delta.mask)
    return model


def revert_delta(
    model: nn.Module, path: str | Path, base_dir: str | Path | None = None
) -> nn.Module:
    """Write the base's values back at a delta's entries, in place.

    Args:
        model: a model that the delta was applied to.
        path: the delta.
        base_dir: folder of the base; default the one the model was loaded from.

    Raises:
        DeltaError: the delta is damaged or belongs to another model, or the base is unknown or not
            the delta's.
    """
    folder = base_dir or getattr(model, "base_dir", None)
    if folder is None:
        raise DeltaError("revert reads the base's values: give base_dir")
    mask = Delta.load(path).mask
    expected = mask.metadata.base_fingerprint
    if expected is not None and (found := fingerprint(folder)) != expected:
        raise DeltaError(
            f"{path} belongs to another model: fingerprint {expected}, that of {folder} is {found}"
        )
    stored = StoredParameters(folder, named_shapes(base_shapes(model)))
    values = ((n, gather_entries(stored.read(n), mask.entries(n))) for n in selected_names(mask))
    _write(model, mask, values, path)
    if (applied := getattr(model, APPLIED, None)) is not None:
        setattr(model, APPLIED, applied - mask)
    return model


@torch.no_grad()
def _write(
    model: nn.Module, mask: ParameterMask, values: Iterator[tuple[str, Tensor]], path: str | Path
) -> None:
    """Values into weights, and from there into the trainable entries of a restricted model."""
    refuse_shards(model, f"{path} is not written into it")
    try:
        mask.check_matches(base_shapes(model), getattr(model, "base_fingerprint", None))
    except MaskError as error:
        raise DeltaError(f"{path} belongs to another model: {error}") from error
    parameters = dict(model.named_parameters())
    scatters = []
    for name, new in values:
        weight = parameters[name]
        # In the weight's dtype: a delta may hold a dtype that no kernel reads.
        new = new.to(weight.device, weight.dtype)
        scatters.append((weight.detach(), _entries_on(mask, name, weight), new))
    scatter_selected_(scatters)
    read_back(links(model))


def merge(base_dir: str | Path, delta_path: str | Path, out_dir: str | Path) -> Path:
    """Write base + delta as an ordinary Hugging Face folder.

    It is in the base's dtype; where the delta's values are wider (a bf16 base trained in 32-true),
    in theirs: so it is the trained model to the bit either way.

    Raises:
        DeltaError: the delta is damaged or belongs to another model.
        ModelError: the base cannot be read, or the output folder holds something else.
    """
    model, tokenizer = load_language_model(base_dir, dtype="auto")
    if (wider := _wider_dtype(model, Delta.load(delta_path))) is not None:
        model, tokenizer = load_language_model(base_dir, dtype=wider)
    return save_language_model(apply_delta(model, delta_path), tokenizer, out_dir)


def _wider_dtype(model: nn.Module, delta: Delta) -> torch.dtype | None:
    """The dtype that holds base and delta, where the base's own would round the delta's values."""
    for name, parameter in model.named_parameters():
        if name in delta.values:
            both = torch.promote_types(parameter.dtype, delta.values[name].dtype)
            if both != parameter.dtype:
                return both
    return None
