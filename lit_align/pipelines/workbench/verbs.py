"""`lit-align mask`: look at, compare, combine and draw masks (`convert` has its own file)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from lit_align.errors import MaskError
from lit_align.files import write_atomically
from lit_align.localizers.layer_gate import read_scores
from lit_align.masks import ParameterMask
from lit_align.masks.compare import Comparison, compare_masks
from lit_align.masks.membership import DEFAULT_SHARE, Level, linear_weight_names
from lit_align.pipelines.workbench.files import (
    Architecture,
    Figure,
    load_masks,
    read_architecture,
    short_names,
    write_figures,
)
from lit_align.report import Table, format_table
from lit_align.report.mask_figures import (
    Picture,
    jaccard_figure,
    layer_figure,
    mask_figures,
)
from lit_align.report.mask_tables import (
    block_table,
    facts_table,
    head_table,
    jaccard_table,
    module_table,
    parameter_table,
)
from lit_align.report.tables import format_cell, printable

Operation = Literal["and", "or", "minus", "invert"]
Kind = Literal["all", "layers", "heads", "scores", "density", "jaccard"]
SYMBOLS = {"and": "&", "or": "|", "minus": "-", "invert": "~"}


def show(file: str, model: str | None = None, parameters: bool = False) -> list[Table]:
    """What a mask selects: its facts, then by block and by module, with the realised ratios.

    Args:
        file: the mask.
        model: folder, hub id or alias of its model: adds a table of attention heads.
        parameters: add a table of every parameter.

    Returns:
        The tables, which are printed too.
    """
    architecture = None if model is None else Architecture.read(model)
    mask = load_masks([file], architecture)[file]
    tables = [facts_table(mask, file), block_table(mask), module_table(mask)]
    if architecture is not None and architecture.heads is not None:
        tables.append(head_table(mask, architecture.heads))
    if parameters:
        tables.append(parameter_table(mask))
    print(_facts(tables[0]), *map(format_table, tables[1:]), sep="\n\n")
    return tables


def compare(
    files: Sequence[str],
    level: Level | None = None,
    share: float = DEFAULT_SHARE,
    model: str | None = None,
    across_bases: bool = False,
    output: str | None = None,
) -> Comparison:
    """The Jaccard index of every two masks, beside that of random sets of the same sizes.

    Args:
        files: two masks or more, over the same parameters.
        level: `element`, `row`, `head` or `layer`; by default the granularity of the masks where
            they have one in common, else `element`. Layers are the linear ones.
        share: a row, head or layer belongs to a mask that selects at least this share of it.
        model: folder, hub id or alias of the masks' model: needed for heads; makes rows and layers
            exact, which names and shapes tell otherwise.
        across_bases: compare masks that were located on different base models of one architecture.
        output: write the comparison to this file: numbers (`.json`) or a picture.

    Returns:
        The comparison, which is printed too.
    """
    architecture = None if model is None else Architecture.read(model)
    masks = load_masks(files, architecture, across_bases=across_bases)
    level = level or _common_level(masks.values())
    if level == "head":
        architecture = architecture or read_architecture(model, "a comparison by heads")
    comparison = _compared(masks, level, share, architecture)
    table = jaccard_table(comparison)
    print(format_table(table))
    if output is not None and output.endswith(".json"):
        _write_json(output, dataclasses.asdict(comparison))
    elif output is not None:
        title = "Masks compared"
        write_figures(output, title, [jaccard_figure(comparison)], [table], masks)
    return comparison


def combine(
    operation: Operation,
    files: Sequence[str],
    output: str,
    linear: bool = False,
    model: str | None = None,
) -> ParameterMask:
    """Masks as sets: `and` and `or` of all, the first `minus` the others, one `invert`ed.

    Args:
        operation: which.
        files: the masks, over the same parameters and of the same base.
        output: file of the new mask.
        linear: keep linear layers alone. What inverts a mask of layers selects the norms, biases
            and embeddings too, since the mask does not.
        model: folder, hub id or alias of the masks' model, for `linear`; by default names and
            shapes tell which layers are linear.

    Returns:
        The new mask, which is written too.
    """
    if operation not in SYMBOLS:
        raise MaskError(f"masks are combined by one of {tuple(SYMBOLS)}, not {operation!r}")
    if (operation == "invert") != (len(files) == 1):
        raise MaskError(
            f"{operation!r} takes {'one mask' if operation == 'invert' else 'two masks or more'}, "
            f"not {len(files)}"
        )
    architecture = None if model is None else Architecture.read(model)
    masks = load_masks(files, architecture)
    result = _combined(operation, list(masks.values()))
    if linear:
        result = _linear_alone(result, architecture)
    parts = [{"file": file, "digest": mask.digest} for file, mask in masks.items()]
    described = {"operation": operation, "masks": parts, "linear_layers_alone": linear}
    metadata = dataclasses.replace(result.metadata, extra=described)
    result = ParameterMask(result.selections, metadata)
    result.save(output)
    print(f"{result}: {output}")
    return result


def plot(
    files: Sequence[str],
    output: str,
    kind: Kind = "all",
    model: str | None = None,
    ratio: float | None = None,
) -> list[Figure]:
    """Pictures of masks, or of ILA's layer scores.

    Args:
        files: masks over the same parameters, or `scores.json` files of layer scores.
        output: `.png` or `.svg` for one picture, `.html` for any number, with tables.
        kind: `layers` (block × module), `heads` (block × head; needs `model`), `scores` (of the
            heads, where a mask remembers them), `density` (of the rows), `jaccard` (of several
            masks, by the units that `compare` takes), or `all` that apply.
        model: folder, hub id or alias of the masks' model.
        ratio: of layer scores: draw this share of the layers as selected; None: their ranks.

    Returns:
        What was drawn.
    """
    scores = {file: read_scores(file) for file in files if file.endswith(".json")}
    if ratio is not None and not scores:
        raise MaskError("ratio is of layer scores (.json): what a mask selects is in the mask")
    architecture = None if model is None else Architecture.read(model)
    masks = load_masks([f for f in files if f not in scores], architecture, across_bases=True)
    if kind == "heads":
        architecture = architecture or read_architecture(model, "a picture of heads")
        architecture.head_layout()  # says why where there is none
    heads = None if architecture is None else architecture.heads
    kinds = [each for each in get_args(Picture) if kind in ("all", each)]
    figures: list[Figure] = []
    if kind in ("all", "layers"):
        figures += [layer_figure(s.layers, file, ratio=ratio) for file, s in scores.items()]
    for name, mask in short_names(masks).items():
        figures += mask_figures(mask, heads, name, kinds)
    if len(masks) > 1 and kind in ("all", "jaccard"):
        figures.append(jaccard_figure(_compared(masks, None, DEFAULT_SHARE, architecture)))
    if not figures:
        raise MaskError(f"there is nothing to draw of kind {kind!r} in {', '.join(files)}")
    tables = [facts_table(mask, file) for file, mask in masks.items()]
    print(write_figures(output, "Masks", figures, tables, masks))
    return figures


def _facts(table: Table) -> str:
    """Facts as lines that hold the whole of a fingerprint."""
    width = max(len(str(key)) for key, _ in table.rows)
    lines = [f"{key:<{width}}  {format_cell(value)}" for key, value in table.rows]
    return "\n  ".join([table.title, *(printable(line) for line in lines)])


def _common_level(masks: Iterable[ParameterMask]) -> Level:
    found = {mask.metadata.granularity for mask in masks}
    levels: dict[str, Level] = {"row": "row", "head": "head", "layer": "layer"}
    return levels.get(found.pop(), "element") if len(found) == 1 else "element"


def _compared(
    masks: Mapping[str, ParameterMask],
    level: Level | None,
    share: float,
    architecture: Architecture | None,
) -> Comparison:
    """By a level, or the one that the masks have in common as far as the model is known."""
    if level is None:
        level = _common_level(masks.values())
        if level == "head" and (architecture is None or architecture.heads is None):
            level = "element"
    known: dict[str, Any] = {}
    if architecture is not None:
        known = {"row_axes": architecture.row_axes, "layers": architecture.names.modules}
    if architecture is not None and level == "head":
        known["heads"] = architecture.head_layout()
    return compare_masks(short_names(masks), level, share=share, **known)


def _combined(operation: str, masks: list[ParameterMask]) -> ParameterMask:
    result = masks[0]
    if operation == "invert":
        return ~result
    for mask in masks[1:]:
        if operation == "and":
            result = result & mask
        else:
            result = result | mask if operation == "or" else result - mask
    return result


def _linear_alone(mask: ParameterMask, architecture: Architecture | None) -> ParameterMask:
    names = architecture.names.modules if architecture else linear_weight_names(mask)
    selections = {
        name: selection if name in names else selection & ~selection
        for name, selection in mask.selections.items()
    }
    return ParameterMask(selections, mask.metadata)


def _write_json(path: str, document: dict[str, Any]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), json.dumps(document, indent=1).encode() + b"\n")
