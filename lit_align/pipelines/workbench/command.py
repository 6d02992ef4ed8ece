"""The command line of `lit-align mask`: one verb for each function of the workbench."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, get_args

from lit_align.masks.membership import DEFAULT_SHARE, Level
from lit_align.pipelines.workbench.conversion import convert
from lit_align.pipelines.workbench.verbs import Kind, Operation, combine, compare, plot, show

MODEL = "folder, hub id or alias of the masks' model; only its config is read"


def parser() -> argparse.ArgumentParser:
    """`mask show | compare | combine | plot | convert`, with the options of these functions."""
    found = argparse.ArgumentParser(
        prog="lit-align mask",
        description="Look at masks, compare, combine, draw and convert them.",
        allow_abbrev=False,
    )
    verbs = found.add_subparsers(title="verbs", required=True, metavar="VERB")
    _add_show(_verb(verbs, "show", "what a mask selects, by block and by module", show))
    _add_compare(_verb(verbs, "compare", "Jaccard indices, beside those of random sets", compare))
    _add_combine(_verb(verbs, "combine", "and, or, minus, invert: a new mask", combine))
    _add_plot(_verb(verbs, "plot", "pictures: .png, .svg or one .html page", plot))
    _add_convert(
        _verb(verbs, "convert", "from and to public ALLO masks, peft module lists", convert)
    )
    return found


def mask_command(words: Sequence[str]) -> None:
    """`mask` with the words of a command line."""
    options = vars(parser().parse_args(list(words)))
    function = options.pop("function")
    function(**options)


def _verb(
    verbs: Any, name: str, summary: str, function: Callable[..., Any]
) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    verb.set_defaults(function=function)
    verb.add_argument("--model", help=MODEL)
    return verb


def _add_show(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("file", metavar="FILE", help="the mask")
    verb.add_argument("--parameters", action="store_true", help="a row for every parameter too")


def _add_compare(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("files", nargs="+", metavar="FILE", help="two masks or more")
    verb.add_argument(
        "--level",
        choices=get_args(Level),
        help="by default the masks' granularity where it is the same, else element",
    )
    verb.add_argument(
        "--share",
        type=float,
        default=DEFAULT_SHARE,
        help="a unit belongs to a mask that selects at least this share of it (%(default)s)",
    )
    verb.add_argument(
        "--across-bases", action="store_true", help="though located on different base models"
    )
    verb.add_argument("--output", help="the numbers (.json), or a picture (.png, .svg, .html)")


def _add_combine(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("operation", choices=get_args(Operation))
    verb.add_argument("files", nargs="+", metavar="FILE", help="masks of one base model")
    verb.add_argument("--output", required=True, help="file of the new mask")
    verb.add_argument(
        "--linear",
        action="store_true",
        help="keep linear layers alone: no norms, biases or untied embeddings",
    )


def _add_plot(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("files", nargs="+", metavar="FILE", help="masks, or scores.json of layers")
    verb.add_argument("--output", required=True, help=".png or .svg of one picture, .html of all")
    verb.add_argument(
        "--kind",
        choices=get_args(Kind),
        default="all",
        help="which picture (%(default)s); heads needs --model",
    )
    verb.add_argument(
        "--ratio", type=float, help="of layer scores: draw this share as selected, not the ranks"
    )


def _add_convert(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("file", metavar="FILE", help=".safetensors, .bin (public ALLO) or .json")
    verb.add_argument("--output", required=True, help="one of the other two")
