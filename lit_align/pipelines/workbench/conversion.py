"""`lit-align mask convert`: masks from and for other programs."""

from __future__ import annotations

from pathlib import Path

from lit_align.errors import MaskError
from lit_align.masks import ParameterMask
from lit_align.masks.convert import (
    mask_of_targets,
    peft_targets,
    read_allo,
    read_targets,
    write_allo,
    write_targets,
)
from lit_align.pipelines.workbench.files import Architecture, load_masks, read_architecture

ALLO_SUFFIXES = (".bin", ".pt", ".pth")


def convert(file: str, output: str, model: str | None = None) -> None:
    """A mask from or for another program, as the endings of the files say.

    `.safetensors` is a mask of ours, `.bin` (`.pt`, `.pth`) a dense mask of the public ALLO code,
    and `.json` a list of modules for peft (`target_modules`; an `adapter_config.json` is one).

    Args:
        file: what is read.
        output: what is written.
        model: folder, hub id or alias of the mask's model: needed but for writing `.bin`.

    Raises:
        MaskError: the file is not what its ending says, or is of another model.
    """
    ours, theirs = (_format(name) for name in (file, output))
    if ours == theirs:
        raise MaskError(f"{file} and {output} have the same format: nothing to convert")
    architecture = None
    if model is not None or "peft" in (ours, theirs) or ours == "ALLO":
        architecture = read_architecture(model, f"converting {file} to {output}")
    mask = _read(file, ours, architecture)
    if theirs == "mask":
        mask.save(output)
    elif theirs == "ALLO":
        write_allo(mask, output)
    else:
        assert architecture is not None
        try:
            targets = peft_targets(mask, architecture.names)
        except MaskError as error:
            raise MaskError(f"{file}: {error}") from error
        write_targets(targets, output, mask)
    print(f"{mask}: {output}")


def _read(file: str, kind: str, architecture: Architecture | None) -> ParameterMask:
    if kind == "mask" or architecture is None:
        return load_masks([file], architecture)[file]
    base = architecture.fingerprint()
    if kind == "ALLO":
        return read_allo(file, architecture.names, base_fingerprint=base)
    targets = read_targets(file)
    try:
        return mask_of_targets(targets, architecture.names, base_fingerprint=base)
    except MaskError as error:
        raise MaskError(f"{file}: {error}") from error


def _format(name: str) -> str:
    suffix = Path(name).suffix.lower()
    if suffix in ALLO_SUFFIXES:
        return "ALLO"
    formats = {".safetensors": "mask", ".json": "peft"}
    if suffix not in formats:
        raise MaskError(
            f"{name}: ends neither in .safetensors (a mask) nor in {', '.join(ALLO_SUFFIXES)} (a "
            "public ALLO mask) nor in .json (peft's target_modules)"
        )
    return formats[suffix]
