"""The variants that an ILA run compares: which layers each of them trains, and how."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lit_align.callbacks.milestones import milestone_name
from lit_align.localizers.layer_gate import layer_gate_mask
from lit_align.masks import ParameterMask
from lit_align.pipelines.ila.run import TRANSFERRED, ILARun
from lit_align.pipelines.ila.settings import Method

# Orders of the layers to compare with; a ranking cannot be called so.
RANDOM, FIRST, LAST = (":random_1", ":random_2"), ":first", ":last"


@dataclasses.dataclass(frozen=True)
class Choice:
    """One variant.

    Attributes:
        name: of its stage and its mask.
        label: of its row in the table.
        method: how the layers train.
        rankings: whose top layers train: the union, so what is frozen is what all of them rank
            low; none: every parameter trains.
        share: of the layers, from each ranking.
    """

    name: str
    label: str
    method: Method
    rankings: tuple[str, ...]
    share: float = 1.0

    def mask(
        self,
        scores: Mapping[str, Mapping[str, float]],
        shapes: Mapping[str, Any],
        base_fingerprint: str,
    ) -> ParameterMask:
        """The layers that train.

        Args:
            scores: ranking → layer → score.
            shapes: of every parameter of the model.
            base_fingerprint: of the model.
        """
        mask, *others = (
            layer_gate_mask(scores[name], shapes, self.share, base_fingerprint=base_fingerprint)
            for name in self.rankings
        )
        for other in others:
            mask |= other
        return mask


def choices(run: ILARun) -> list[Choice]:
    """Every variant, in the table's order."""
    listed = [*_baselines_of_all(run), *_of_rankings(run)]
    if run.use.transfer:
        listed += _of_ranking(run, TRANSFERRED, f"{TRANSFERRED}_", "transferred: ")
    return [*listed, *_baselines_of_shares(run)]


def _baselines_of_all(run: ILARun) -> Iterator[Choice]:
    method = run.use.method
    if "full" in run.use.baselines:
        yield Choice("full", "every parameter", "full", ())
    if "all" in run.use.baselines:
        yield Choice("all", f"every layer ({method})", method, (FIRST,))
    if "adalora" in run.use.baselines:
        yield Choice("adalora", "every layer (AdaLoRA)", "adalora", (FIRST,))


def _of_rankings(run: ILARun) -> Iterator[Choice]:
    names = list(run.rankings())
    if len(names) == 1:
        yield from _of_ranking(run, names[0], "", "")
    for name in names if len(names) > 1 else ():
        yield from _of_ranking(run, name, f"{name}_", f"{name}: ")
    for share in run.use.freeze if len(names) > 1 else ():
        label = f"frozen: the lowest {100 * share:g} % of all {len(names)} rankings"
        yield Choice(f"shared_freeze_{milestone_name(share)}", label, run.use.method, tuple(names),
                     trained(share))  # fmt: skip


def _of_ranking(run: ILARun, ranking: str, prefix: str, words: str) -> Iterator[Choice]:
    for share in run.use.freeze:
        label = f"{words}lowest {100 * share:g} % frozen"
        name = f"{prefix}freeze_{milestone_name(share)}"
        yield Choice(name, label, run.use.method, (ranking,), trained(share))
    for share in run.use.top:
        label = f"{words}top {100 * share:g} %"
        yield Choice(
            f"{prefix}top_{milestone_name(share)}", label, run.use.method, (ranking,), share
        )


def _baselines_of_shares(run: ILARun) -> Iterator[Choice]:
    wanted = {
        RANDOM[0]: ("random", "random 1: "),
        RANDOM[1]: ("random", "random 2: "),
        FIRST: ("first", "first "),
        LAST: ("last", "last "),
    }
    for share in run.use.baseline_freeze:
        for order, (baseline, words) in wanted.items():
            if baseline in run.use.baselines:
                name = f"{order[1:]}_freeze_{milestone_name(share)}"
                label = f"{words}{100 * share:g} % frozen"
                yield Choice(name, label, run.use.method, (order,), trained(share))


def trained(frozen: float) -> float:
    """The share that trains where another is frozen, without the noise of binary fractions."""
    return round(1 - frozen, 9)


def orders(layers: Sequence[str], seed: int) -> dict[str, dict[str, float]]:
    """Scores that make the baselines: two random orders, the first layers low, the last low."""
    places = {name: float(i) for i, name in enumerate(layers)}
    found = {FIRST: places, LAST: {name: -place for name, place in places.items()}}
    for name in RANDOM:
        drawn = random.Random(f"{seed}{name}")
        found[name] = {layer: drawn.random() for layer in layers}
    return found
