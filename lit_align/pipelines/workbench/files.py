"""What the verbs of the workbench share: reading masks and models, writing pictures."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from lit_align.errors import MaskError, ModelError
from lit_align.files import write_atomically
from lit_align.language_model import fingerprint, resolve_model
from lit_align.localizers.stored import meta_model
from lit_align.masks import HeadLayout, ParameterMask, conv1d_row_axes
from lit_align.masks.compare import check_same_parameters
from lit_align.masks.convert import ModelNames
from lit_align.report import HeatMap, Histogram, Table, drawing, write_report
from lit_align.report.html import NO_PICTURES

Figure = HeatMap | Histogram
PICTURES: dict[str, Literal["svg", "png"]] = {".svg": "svg", ".png": "png"}
PAGES = (".html", ".htm")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What the workbench needs of a model: names, shapes and heads, read from its config alone.

    Attributes:
        folder: of the model.
        names: of its parameters and linear layers.
        row_axes: 1 for the weights of GPT-2's `Conv1D`.
        heads: where its heads lie; None: they cannot be told apart, and `no_heads` says why.
    """

    folder: Path
    names: ModelNames
    row_axes: dict[str, int]
    heads: HeadLayout | None
    no_heads: str = ""

    @classmethod
    def read(cls, model: str) -> Architecture:
        """Of a local folder, hub id or alias.

        Raises:
            ModelError: it leads nowhere, or has no config of a causal language model.
        """
        folder = resolve_model(model)
        empty = meta_model(folder)
        heads, no_heads = None, ""
        try:
            heads = HeadLayout.from_model(empty)
        except MaskError as error:
            no_heads = str(error)
        names, row_axes = ModelNames.of_model(empty), conv1d_row_axes(empty)
        return cls(folder, names, row_axes, heads, no_heads)

    def fingerprint(self) -> str | None:
        """Of the folder's weights; None where it has only a config."""
        if not any(self.folder.glob("*.safetensors")):
            return None
        return fingerprint(self.folder)

    def head_layout(self) -> HeadLayout:
        """Where its heads lie.

        Raises:
            MaskError: they cannot be told apart.
        """
        if self.heads is None:
            raise MaskError(f"{self.folder}: {self.no_heads}")
        return self.heads

    def check(self, file: str, mask: ParameterMask) -> None:
        """Refuse a mask over other parameters; the message names mask and model."""
        try:
            mask.check_matches(self.names.shapes)
        except MaskError as error:
            raise MaskError(f"{file} is no mask of {self.folder}: {error}") from error


def read_architecture(model: str | None, why: str) -> Architecture:
    """Of a model that a verb cannot do without."""
    if model is None:
        raise ModelError(f"{why} needs the model: name it by --model (its config is enough)")
    return Architecture.read(model)


def load_masks(
    files: Sequence[str], architecture: Architecture | None, *, across_bases: bool = False
) -> dict[str, ParameterMask]:
    """The masks of some files, by the files' names.

    Raises:
        MaskError: no such mask, a file that is named twice, masks over other parameters, or (but
            for `across_bases`) of other base models.
    """
    masks: dict[str, ParameterMask] = {}
    for file in files:
        if file in masks:
            raise MaskError(f"{file} is named twice")
        masks[file] = ParameterMask.load(file)
        if architecture is not None:
            architecture.check(file, masks[file])
    if len(masks) > 1:
        check_same_parameters(masks)
    if not across_bases:
        _check_same_base(masks)
    return masks


def short_names(masks: Mapping[str, ParameterMask]) -> dict[str, ParameterMask]:
    """The masks under as much of their files' names as tells them apart.

    >>> list(short_names(dict.fromkeys(("runs/a/mask.safetensors", "runs/b/mask.safetensors"))))
    ['a/mask', 'b/mask']
    """
    if not masks:
        return {}
    paths = [Path(file).absolute() for file in masks]
    common = os.path.commonpath([path.parent for path in paths])
    names = [path.relative_to(common).as_posix().removesuffix(".safetensors") for path in paths]
    if len(set(names)) < len(names):  # a and a.safetensors
        names = list(masks)
    return dict(zip(names, masks.values(), strict=True))


def write_figures(
    output: str,
    title: str,
    figures: Sequence[Figure],
    tables: Sequence[Table],
    masks: Mapping[str, ParameterMask],
) -> Path:
    """Write one picture (`.png`, `.svg`), or all of them with tables (`.html`).

    Raises:
        MaskError: another ending, several pictures for one file, or no matplotlib.
    """
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix.lower()
    if suffix in PAGES:
        return write_report(
            path,
            title=title,
            tables=tables,
            figures=figures,
            config={file: dataclasses.asdict(mask.metadata) for file, mask in masks.items()},
            fingerprints=_fingerprints(masks),
        )
    if suffix not in PICTURES:
        raise MaskError(f"{output}: a picture ends in .png, .svg or .html")
    if len(figures) != 1:
        raise MaskError(
            f"{output} holds one picture, not {len(figures)}: choose one by --kind and one file, "
            "or name an .html file"
        )
    try:
        write_atomically(path, drawing.picture(figures[0], PICTURES[suffix]))
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        raise MaskError(NO_PICTURES) from error
    return path


def _fingerprints(masks: Mapping[str, ParameterMask]) -> dict[str, str]:
    digests = {f"{file}: selection": mask.digest for file, mask in masks.items()}
    bases = {f"{file}: base model": m.metadata.base_fingerprint for file, m in masks.items()}
    return digests | {name: base for name, base in bases.items() if base is not None}


def _check_same_base(masks: Mapping[str, ParameterMask]) -> None:
    known = {f: b for f, m in masks.items() if (b := m.metadata.base_fingerprint) is not None}
    for file, base in known.items():
        first = next(iter(known))
        if base != known[first]:
            raise MaskError(
                f"{first} and {file} were located on different base models: {known[first]} and "
                f"{base}"
            )
