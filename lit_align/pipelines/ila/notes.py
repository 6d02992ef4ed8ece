"""What an ILA run's numbers do not show, in sentences: notes of its report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lit_align.pipelines.ila.run import TRANSFERRED

NAMED = 4  # so many layers are named, the others counted
MANY_TIES = 0.1  # share of the layers; fewer hardly move a cut


def all_notes(results: Mapping[str, Any]) -> list[str]:
    """The notes on `results.json`, those on the comparison first."""
    return [
        *_on_variants(results["variants"]),
        *_on_stability(results["stage1"]),
        *_on_gates(results["rankings"]),
        *_on_transfer(results.get(TRANSFERRED)),
    ]


def _on_variants(variants: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    measured = {n: v for n, v in variants.items() if v["validation_loss"] is not None}
    if not measured:
        return
    if all(len(v["validation_losses"]) == 1 for v in measured.values()):
        yield "Each variant was trained once: " + _random_difference(measured)
        return
    best = min(measured.values(), key=lambda v: v["validation_loss"])
    equals = [
        v["label"] for v in measured.values() if v is not best and v["lowest"] <= best["highest"]
    ]
    if equals:
        yield (
            f"The losses of “{best['label']}” over its seeds overlap with those of "
            f"{', '.join(f'“{e}”' for e in equals)}: these runs do not rank them."
        )


def _random_difference(measured: Mapping[str, Mapping[str, Any]]) -> str:
    pairs = [
        abs(first["validation_loss"] - measured[other]["validation_loss"])
        for name, first in measured.items()
        if name.startswith("random_1_") and (other := f"random_2_{name[9:]}") in measured
    ]
    if not pairs:
        return "small differences between rows are not a ranking (use.seeds trains more often)."
    return (
        f"the two random selections differ by up to {max(pairs):.2g} nats, and rows that differ by "
        "less are not ranked (use.seeds trains more often)."
    )


def _on_stability(stage1: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for dataset, found in stage1.items():
        if found["stable"]:
            yield (
                f"{dataset}: ε-stable after {found['steps']} steps (ε = {found['epsilon']:g} a "
                f"step, windows of {found['window']} steps)."
            )
        else:
            few = found["steps"] - found["warmup_steps"] < 3 * found["window"] - 1
            too_few = f" (too few to see it: that takes three windows of {found['window']})"
            yield (
                f"{dataset}: ε = {found['epsilon']:g} was never met: the training went to its "
                f"limit of {found['steps']} steps{too_few if few else ''}, and the change is that "
                "of its end."
            )


def _on_gates(rankings: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name, found in rankings.items():
        if found["saturated"]:
            yield (
                f"{name}: every gate is saturated (within 0.01 of 0 or 1): the ranking says "
                "little; try a lower stage2.learning_rate or another stage2.initial_score."
            )
        if found["ties"] > MANY_TIES * found["layers"]:
            yield (
                f"{name}: {found['ties']} of {found['layers']} layers share their score with "
                "another; among those the model's order decides."
            )
        if found["unscored"]:
            yield (
                f"{name}: {_some(found['unscored'])} did not change, have no score, and stay "
                "frozen in every variant of this ranking."
            )


def _on_transfer(transfer: Mapping[str, Any] | None) -> Iterator[str]:
    if transfer is None:
        return
    yield f"{len(transfer['scores'])} layers take their score from the other architecture."
    if transfer["unmatched"]:
        yield (
            f"{_some(transfer['unmatched'])} have no counterpart there that has a score, and stay "
            "frozen in every transferred variant."
        )
    if transfer["unused"]:
        yield f"The model has no module called {', '.join(transfer['unused'])}, which is ranked."


def _some(layers: list[str]) -> str:
    named = ", ".join(layers[:NAMED])
    more = f" and {len(layers) - NAMED} more" if len(layers) > NAMED else ""
    return f"{len(layers)} layer(s) ({named}{more})"
