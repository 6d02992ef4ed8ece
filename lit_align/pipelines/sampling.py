"""Responses of the current model: drawn, judged, paired."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, product

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_align.errors import DataError
from lit_align.evaluation import generate
from lit_align.pipelines.rows import Row, as_response, is_right
from lit_align.pipelines.settings import SampleSettings


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    settings: SampleSettings,
) -> list[Row]:
    """The rows with `right` and `wrong`: distinct sampled responses of either kind."""
    drawn = generate(
        model,
        tokenizer,
        [row["prompt"] for row in rows],
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        num_samples=settings.num_samples,
        batch_size=settings.batch_size,
        seed=settings.seed,
    )
    sampled = []
    for row, responses in zip(rows, drawn, strict=True):
        distinct = [text for text in dict.fromkeys(r.strip() for r in responses) if text]
        verdicts = [is_right(row, text) for text in distinct]
        by_verdict = {
            name: [t for t, v in zip(distinct, verdicts, strict=True) if v is wanted]
            for name, wanted in (("right", True), ("wrong", False))
        }
        sampled.append(row | by_verdict)
    return sampled


def make_pairs(sampled: Sequence[Row], settings: SampleSettings) -> tuple[list[Row], list[Row]]:
    """Preference pairs (right × wrong of one prompt), and every wrong response once.

    Raises:
        DataError: not one pair came out; says why and what to change.
    """
    pairs: list[Row] = []
    wrong: list[Row] = []
    for row in sampled:
        right = row["right"]
        if not right and settings.gold_as_chosen:
            right = [row["target"]]
        for chosen, rejected in islice(product(right, row["wrong"]), settings.pairs_per_prompt):
            pairs.append(_pair(row, chosen, rejected))
        forgotten = row["wrong"][: settings.wrong_per_prompt or None]
        wrong += [_wrong(row, text, i) for i, text in enumerate(forgotten)]
    if not pairs:
        raise DataError(
            f"{len(sampled)} questions gave no pair of a right and a wrong response: raise "
            "sample.num_samples or sample.temperature, or set sample.gold_as_chosen"
        )
    return pairs, wrong


def given_pairs(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Pairs and wrong responses of preference rows, where nothing is sampled."""
    pairs = [_pair(row, row["target"], row["rejected"]) for row in rows]
    return pairs, [_wrong(row, row["rejected"], 0) for row in rows]


def _pair(row: Row, chosen: object, rejected: object) -> Row:
    return {
        "id": row["id"],
        "prompt": row["prompt"],
        "chosen": as_response(row["prompt"], chosen),
        "rejected": as_response(row["prompt"], rejected),
    }


def _wrong(row: Row, response: object, number: int) -> Row:
    return row | {"id": f"{row['id']}/{number}", "response": response}
