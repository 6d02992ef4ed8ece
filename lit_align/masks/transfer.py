"""Layer scores of one architecture for another: by relative block position and module name.

The transfer of layer rankings across models of ILA (arXiv 2410.17875, section 4.5 and appendix
C.3), which reaches a Jaccard similarity of about 0.70 between Llama 2 and Mistral.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from lit_align.errors import MaskError
from lit_align.masks.table import split_name


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Scores that were carried over, and what was not.

    Attributes:
        scores: layer of the target → score, in the target's order.
        sources: the same layers → the layer that the score comes from.
        unmatched: layers of the target whose counterpart is missing or has no score, in order:
            they have none either.
        unused: modules of the source, by name, that the target does not have.
    """

    scores: dict[str, float]
    sources: dict[str, str]
    unmatched: tuple[str, ...]
    unused: tuple[str, ...]


def transfer_scores(
    scores: Mapping[str, float], to_layers: Iterable[str], unscored: Iterable[str] = ()
) -> Transfer:
    """Scores for the layers of another model.

    A layer takes the score of the layer of the same module name (`self_attn.q_proj`) in the block
    at the nearest relative position: the first block is 0 and the last is 1, and of two that are
    equally near it is the lower one. Only blocks that have the module count. Outside the blocks a
    layer takes the score of its name; where each model has a single layer there, it is the head,
    which goes by the embedding's name where the two are tied. Names that differ otherwise
    (`q_proj`, `c_attn`) are not guessed at.

    Args:
        scores: layer name → score, of the source's linear layers.
        to_layers: the linear layers of the target (`linear_layers(model)`).
        unscored: linear layers of the source that have no score; they too have a place.

    Raises:
        MaskError: no module inside the blocks has the same name in both; names both sides.

    >>> found = transfer_scores({"h.0.fc.weight": 1.0, "h.1.fc.weight": 2.0}, ["x.5.fc.weight"])
    >>> found.scores  # a single block stands at the first one's place
    {'x.5.fc.weight': 1.0}
    """
    wanted, theirs = list(to_layers), [*scores, *unscored]
    source_blocks, target_blocks = _blocks(theirs), _blocks(wanted)
    by_module: dict[str, dict[int | None, str]] = {}
    for name in theirs:
        block, module = split_name(name)
        by_module.setdefault(module, {})[block] = name
    sources = {}
    for name in wanted:
        block, module = split_name(name)
        candidates = by_module.get(module, {})
        if block is None:
            source = candidates.get(None) or _other_head(theirs, wanted)
        else:
            source = _nearest(candidates, block, target_blocks, source_blocks)
        if source is not None and source in scores:
            sources[name] = source
    if all(split_name(name)[0] is None for name in sources):
        raise MaskError(
            f"no layer of the blocks is called the same in both models: the scores are of "
            f"{_modules(scores)}, the model has {_modules(wanted)}; a ranking is transferred by "
            "module name alone"
        )
    known = {split_name(name)[1] for name in (*wanted, *sources.values())}
    return Transfer(
        {name: scores[source] for name, source in sources.items()},
        sources,
        tuple(name for name in wanted if name not in sources),
        tuple(m for m in dict.fromkeys(split_name(n)[1] for n in scores) if m not in known),
    )


def _blocks(names: Iterable[str]) -> list[int]:
    """The numbers of the blocks, in order."""
    return sorted({block for name in names if (block := split_name(name)[0]) is not None})


def _nearest(
    candidates: Mapping[int | None, str], block: int, targets: list[int], sources: list[int]
) -> str | None:
    """The candidate at the nearest relative position, compared in whole numbers."""
    position, last = targets.index(block), len(targets) - 1

    def distance(candidate: int) -> tuple[int, int]:
        place = sources.index(candidate)
        return abs(place * max(last, 1) - position * (len(sources) - 1)), place

    inside = [number for number in candidates if number is not None]
    return candidates[min(inside, key=distance)] if inside else None


def _other_head(scores: Iterable[str], wanted: Iterable[str]) -> str | None:
    """The source's only layer outside the blocks, where the target has a single one as well."""
    outside = [[n for n in names if split_name(n)[0] is None] for names in (scores, wanted)]
    return outside[0][0] if [len(names) for names in outside] == [1, 1] else None


def _modules(names: Iterable[str]) -> str:
    parts = dict.fromkeys(split_name(n) for n in names)
    return ", ".join(dict.fromkeys(m for block, m in parts if block is not None)) or "no block"
