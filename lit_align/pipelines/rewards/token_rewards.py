"""Token weights for wrong responses: which tokens the forgetting stage is to unlearn.

By a reward model trained on the rewriting task (`rewriting`): teacher-forced on the ORIGINAL
response, it gives an unaligned token a low probability p_t. Or by the edits alone that lead to a
correction (`corrections`). Source: ALLO, arXiv 2406.12606; RLMEC, arXiv 2401.06081.
"""

from __future__ import annotations

import collections
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from transformers import PreTrainedTokenizerBase

from lit_align.data import BadRowError, RowTokenizer, TokenizedSequence, UnlearningRow
from lit_align.data.validate import check_row
from lit_align.errors import DataError, TrainingError
from lit_align.pipelines.rewards.edit_distance import align
from lit_align.pipelines.rewards.predictions import Prediction
from lit_align.pipelines.rewards.reward_model import (
    RewardModel,
    check_same_tokenizer,
    token_probabilities,
)
from lit_align.pipelines.rewards.rewriting import rewriting_prompt

WeightRule: TypeAlias = Literal["binary", "soft", "raw", "edit"]
WHOLE = sys.maxsize  # the data module wants one weight for every token, before it truncates

NO_WEIGHT = "no weighted token"
NO_CORRECTION = "no correction"
TOO_LONG = "longer than max_length"


class WeightedRows(NamedTuple):
    """Rows for the forgetting stage.

    Attributes:
        rows: dicts that can be written as JSON lines for an `UnlearningDataModule`: `prompt`,
            `response`, `token_weights` (a number for each response token, EOS included), and, to
            look at, `correction` (None where there is none) and the `id` of the question's row.
        statistics: numbers of predictions, rows, response tokens and weighted (≠ 0) ones, the
            latter's share and the mean weight, and how many predictions were dropped for which
            reason.
    """

    rows: list[dict[str, Any]]
    statistics: dict[str, Any]


def weighted_rows(
    predictions: Sequence[Prediction],
    corrections: Sequence[str | None],
    tokenizer: PreTrainedTokenizerBase,
    *,
    rule: WeightRule = "binary",
    threshold: float = 0.5,
    reward_model: RewardModel | None = None,
    progress: bool = True,
) -> WeightedRows:
    """Put a weight on every token of every wrong response.

    `binary`: 1 where p_t < threshold; `soft`: 1 − p_t; `raw`: p_t, as in ALLO's public script;
    `edit`: 1 on the tokens that the correction substitutes or deletes (see `align`; insertions mark
    nothing), which needs a correction and no reward model. The others ask the reward model, for
    which the gold solution is enough: a prediction without a correction is scored as well.

    EOS is a token as any other: with p_t, a response that stops in the wrong place gets a weight
    there; with `edit` it is always kept, since the correction ends with it, too.

    A prediction is dropped and counted where no token has a weight, where `edit` finds no
    correction, where the reward model cannot take its length, or where the data module would call
    it a bad row (blank, control characters, a special token as text).

    Args:
        predictions: wrong ones.
        corrections: one for each, or None.
        tokenizer: the policy's, as its data module has it (`UnlearningDataModule.tokenizer`).
        rule: see above.
        threshold: of `binary`, in (0, 1].
        reward_model: of every rule but `edit`.
        progress: show a bar.

    Raises:
        TrainingError: an unknown rule, no reward model, or a threshold out of its range.
        ModelError: policy and reward model have different tokenizers.
        DataError: not one row is left; names the reasons.
    """
    _check_settings(rule, threshold, reward_model)
    dropped: collections.Counter[str] = collections.Counter()
    usable = _tokenized(list(zip(predictions, corrections, strict=True)), tokenizer, dropped)
    if rule == "edit":
        weighted = _edit_weighted(usable, tokenizer, dropped)
    else:
        assert reward_model is not None
        check_same_tokenizer(tokenizer, reward_model.tokenizer)
        fitting = _rewriting_sequences(usable, reward_model, dropped)
        probabilities = token_probabilities(
            [sequence for _, sequence in fitting], reward_model, progress=progress
        )
        weighted = [
            (one, probability_weights(p, rule, threshold))
            for (one, _), p in zip(fitting, probabilities, strict=True)
        ]
    return _finished(weighted, dropped, {"rule": rule, "threshold": threshold})


def _check_settings(rule: str, threshold: float, reward_model: RewardModel | None) -> None:
    if rule not in ("binary", "soft", "raw", "edit"):
        raise TrainingError(f"token weights {rule!r}: binary | soft | raw | edit")
    if rule != "edit" and reward_model is None:
        raise TrainingError(f"token weights {rule!r} need a reward model; `edit` needs none")
    if not 0 < threshold <= 1:
        raise TrainingError(f"threshold is {threshold}, not in (0, 1]")


def probability_weights(
    probabilities: np.ndarray, rule: WeightRule, threshold: float = 0.5
) -> np.ndarray:
    """Weights (N,) of tokens with probabilities (N,): `binary`, `soft` or `raw`.

    By hand: (0.9, 0.5, 0.2) → (0, 0, 1), (0.1, 0.5, 0.8), (0.9, 0.5, 0.2).
    """
    if rule == "binary":
        return (probabilities < threshold).astype(np.float32)
    return 1 - probabilities if rule == "soft" else probabilities


@dataclasses.dataclass(frozen=True)
class _Response:
    """A wrong prediction, its correction, and its tokens as the policy's data module has them."""

    prediction: Prediction
    correction: str | None
    row: UnlearningRow
    response_ids: np.ndarray


def _tokenized(
    pairs: Sequence[tuple[Prediction, str | None]],
    tokenizer: PreTrainedTokenizerBase,
    dropped: collections.Counter[str],
) -> list[_Response]:
    """The predictions that the data module can use."""
    tokenize = RowTokenizer(tokenizer, WHOLE)
    usable = []
    for prediction, correction in pairs:
        row = UnlearningRow(prediction.prompt, prediction.as_response(prediction.response))
        try:
            check_row(row)
            for content in (row.prompt, row.response):
                if tokenize.encoder.special_tokens_in(content):
                    raise BadRowError("special token as text")
            sequence = tokenize(row).sequences[0]
        except BadRowError as error:
            dropped[error.reason] += 1
        else:
            usable.append(_Response(prediction, correction, row, sequence.response_ids))
    return usable


def _edit_weighted(
    responses: Sequence[_Response],
    tokenizer: PreTrainedTokenizerBase,
    dropped: collections.Counter[str],
) -> list[tuple[_Response, np.ndarray]]:
    """Weights from the edits; the correction is tokenised after the same prompt."""
    tokenize = RowTokenizer(tokenizer, WHOLE)
    weighted = []
    for one in responses:
        if one.correction is None:
            dropped[NO_CORRECTION] += 1
            continue
        right = UnlearningRow(one.row.prompt, one.prediction.as_response(one.correction))
        right_ids = tokenize(right).sequences[0].response_ids
        edited = align(one.response_ids.tolist(), right_ids.tolist()).edited
        weighted.append((one, edited.astype(np.float32)))
    return weighted


def _rewriting_sequences(
    responses: Sequence[_Response], reward_model: RewardModel, dropped: collections.Counter[str]
) -> list[tuple[_Response, TokenizedSequence]]:
    """Rewriting prompt + the very token ids that the policy will be trained on."""
    tokenize = RowTokenizer(reward_model.tokenizer, WHOLE)
    fitting = []
    for one in responses:
        prompt = rewriting_prompt(one.prediction)
        sequence = tokenize(dataclasses.replace(one.row, prompt=prompt)).sequences[0]
        sequence = dataclasses.replace(sequence, response_ids=one.response_ids)
        if sequence.num_tokens > reward_model.longest:
            dropped[TOO_LONG] += 1
        else:
            fitting.append((one, sequence))
    return fitting


def _finished(
    weighted: Sequence[tuple[_Response, np.ndarray]],
    dropped: collections.Counter[str],
    settings: dict[str, Any],
) -> WeightedRows:
    """Rows and statistics."""
    kept = [(one, weights) for one, weights in weighted if weights.any()]
    dropped[NO_WEIGHT] += len(weighted) - len(kept)
    if not kept:
        why = ", ".join(f"{count} x {reason}" for reason, count in dropped.items() if count)
        raise DataError(f"no wrong response is left with a token to forget: {why or 'none given'}")
    values = np.concatenate([np.zeros(0, np.float32), *(weights for _, weights in kept)])
    tokens, nonzero = len(values), int(np.count_nonzero(values))
    statistics = {
        **settings,
        "predictions": len(kept) + dropped.total(),
        "rows": len(kept),
        "tokens": tokens,
        "weighted_tokens": nonzero,
        "weighted_share": nonzero / max(tokens, 1),
        "mean_weight": float(values.sum(dtype=np.float64)) / max(tokens, 1),
        "dropped": {reason: count for reason, count in sorted(dropped.items()) if count},
    }
    return WeightedRows([_as_dict(*pair) for pair in kept], statistics)


def _as_dict(one: _Response, weights: np.ndarray) -> dict[str, Any]:
    columns = {
        "prompt": one.row.prompt,
        "response": one.row.response,
        "token_weights": [float(f"{w:.6g}") for w in weights],  # short in a file, and never 0
        "correction": one.correction,
    }
    row_id = one.prediction.row.get("id")
    return columns if row_id is None else {"id": row_id, **columns}
