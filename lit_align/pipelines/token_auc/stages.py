"""The stages of `token_weight_auc`: train a reward model, ask it, compare with people's spans."""

from __future__ import annotations

import collections
import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_align.data import RowTokenizer, SFTDataModule, UnlearningRow
from lit_align.data.templates import chat_template_text
from lit_align.errors import DataError, PipelineError
from lit_align.evaluation.auc import mean_auc, pooled_auc
from lit_align.language_model import load_language_model, resolve_model, save_language_model
from lit_align.modules import SupervisedFineTuning
from lit_align.pipelines.rewards.edit_distance import align
from lit_align.pipelines.rewards.reward_model import RewardModel, token_probabilities
from lit_align.pipelines.rewards.rewriting import rewriting_prompt, rewriting_rows
from lit_align.pipelines.rewards.token_rewards import TOO_LONG, WHOLE, probability_weights
from lit_align.pipelines.rows import NUMBER, read_json, write_json
from lit_align.pipelines.run_folder import MODEL_FOLDER
from lit_align.pipelines.setting_checks import COUNT, NOT_NEGATIVE, RATIO, check
from lit_align.pipelines.settings import RunSettings, TrainSettings
from lit_align.pipelines.token_auc.error_spans import (
    LabelledTokens,
    SpannedPrediction,
    labelled_tokens,
    read_spanned,
)
from lit_align.pipelines.training import data_settings, inference_device, module_settings, train

KINDS = ("edit", "binary", "soft", "raw")


@dataclasses.dataclass(frozen=True)
class TokenAucSettings:
    """Which rows, and how they are measured.

    Attributes:
        train: without it the model is asked as it is, about the same rows.
        train_rows: rows that the reward model is trained on, and that are not measured.
        identity_rows: of these rows' corrections, so many are also trained to be left as they are.
        test_rows: of the other rows, measure so many (0: all).
        threshold: of `binary`.
        batch_size: responses scored at a time.
        bootstrap: samples of the intervals.
        seed: of the split and of the samples.
    """

    train: bool = True
    train_rows: int = 120
    identity_rows: int = 30
    test_rows: int = 0
    threshold: float = 0.5
    batch_size: int = 4
    bootstrap: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        check(
            "rows",
            self,
            train_rows=COUNT,
            identity_rows=NOT_NEGATIVE,
            test_rows=NOT_NEGATIVE,
            threshold=RATIO,
            batch_size=COUNT,
            bootstrap=COUNT,
        )


@dataclasses.dataclass(frozen=True)
class TokenAucRun:
    """One measurement: its settings, and where its outputs stand."""

    output: Path
    data: str
    model: str
    chat_template: str | None
    rows: TokenAucSettings
    train: TrainSettings
    machine: RunSettings

    @property
    def reward_model(self) -> Path:
        """The folder of the model that is asked."""
        if self.rows.train:
            return self.output / "reward_model" / MODEL_FOLDER
        return resolve_model(self.model)


def split_rows(
    rows: Sequence[SpannedPrediction], settings: TokenAucSettings
) -> tuple[list[SpannedPrediction], list[SpannedPrediction]]:
    """(to train on, to measure), drawn from the seed; those to train on have a correction.

    Raises:
        DataError: there are not enough rows.
    """
    mixed = random.Random(settings.seed).sample(list(rows), len(rows))
    fit = [row for row in mixed if row.spans and row.correction is not None]
    trained = fit[: settings.train_rows]
    if len(trained) < settings.train_rows:
        raise DataError(f"train_rows is {settings.train_rows}, {len(fit)} rows have a correction")
    chosen = set(map(id, trained))
    others = [row for row in mixed if id(row) not in chosen]
    if not others:
        raise DataError("no row is left to measure: lower train_rows")
    # Drawn once more: rows without a correction, which no training took, stand before the others.
    others = random.Random(f"{settings.seed} test").sample(others, len(others))
    return trained, others[: settings.test_rows or None]


def train_reward_model(run: TokenAucRun, folder: Path) -> None:
    """Fine-tune the reward model on the rewriting task."""
    trained, _ = split_rows(read_spanned(run.data), run.rows)
    corrections = [row.correction for row in trained]
    right = [
        dataclasses.replace(row.prediction, response=str(row.correction))
        for row in trained[: run.rows.identity_rows]
    ]
    task = rewriting_rows([row.prediction for row in trained], corrections, right)
    model = str(resolve_model(run.model))
    module = SupervisedFineTuning(model, **module_settings(run.train, run.machine))
    settings = data_settings(run.train, run.machine, folder) | {"chat_template": run.chat_template}
    data = SFTDataModule.from_rows(model, {"train": task}, **settings)
    train(module, data, run.train, run.machine, folder)
    assert module.tokenizer is not None
    save_language_model(module.model, module.tokenizer, folder / MODEL_FOLDER)


def ask_reward_model(run: TokenAucRun, folder: Path) -> None:
    """Probabilities, edits and human labels of the tokens of the rows to measure."""
    model, tokenizer = load_language_model(run.reward_model)
    if run.chat_template is not None:
        tokenizer.chat_template = chat_template_text(run.chat_template)
    model.to(inference_device(run.machine.accelerator))  # type: ignore[arg-type]
    asked = RewardModel(model, tokenizer, run.train.max_length, run.rows.batch_size)
    _, others = split_rows(read_spanned(run.data), run.rows)
    labelled, excluded = labelled_tokens(others, tokenizer)
    kept, probabilities = _probabilities(labelled, asked, excluded)
    rows = [
        {
            "id": one.source.row_id,
            "wrong": one.wrong.astype(int).tolist(),
            "edited": _edited(one, tokenizer).astype(int).tolist(),
            "probabilities": p.astype(float).tolist(),
        }
        for one, p in zip(kept, probabilities, strict=True)
    ]
    write_json(folder / "tokens.json", {"rows": rows, "excluded": dict(excluded)})


def _probabilities(
    labelled: Sequence[LabelledTokens], asked: RewardModel, excluded: collections.Counter[str]
) -> tuple[list[LabelledTokens], list[np.ndarray]]:
    """The rows that fit into the reward model, and p_t of each token but EOS."""
    tokenize = RowTokenizer(asked.tokenizer, WHOLE)
    kept, sequences = [], []
    for one in labelled:
        prediction = one.source.prediction
        row = UnlearningRow(rewriting_prompt(prediction), prediction.as_response("-"))
        prompted = tokenize(row).sequences[0]
        sequence = dataclasses.replace(prompted, response_ids=one.sequence.response_ids)
        if sequence.num_tokens > asked.longest:
            excluded[TOO_LONG] += 1
        else:
            kept.append(one)
            sequences.append(sequence)
    return kept, [p[:-1] for p in token_probabilities(sequences, asked)]


def _edited(one: LabelledTokens, tokenizer: Any) -> np.ndarray:
    """(N - 1,) bool: the tokens that the correction substitutes or deletes."""
    prediction = one.source.prediction
    right = UnlearningRow(prediction.prompt, prediction.as_response(str(one.source.correction)))
    ids = RowTokenizer(tokenizer, WHOLE)(right).sequences[0].response_ids
    return align(one.sequence.response_ids.tolist(), ids.tolist()).edited[:-1]


def measure(run: TokenAucRun, folder: Path) -> None:
    """AUCs from what was written down."""
    written = _read_tokens(run.output / "probabilities" / "tokens.json")
    if not written["rows"]:
        why = ", ".join(f"{count} x {reason}" for reason, count in written["excluded"].items())
        raise DataError(f"no row can be measured: {why}")
    labels = [np.array(row["wrong"], bool) for row in written["rows"]]
    options = {"samples": run.rows.bootstrap, "seed": run.rows.seed}
    results: dict[str, Any] = {}
    for kind in KINDS:
        scores = [_weights(row, kind, run.rows.threshold) for row in written["rows"]]
        results[kind] = {
            "pooled": pooled_auc(labels, scores, **options)._asdict(),
            "by_row": mean_auc(labels, scores, **options)._asdict(),
        }
    flat = np.concatenate(labels)
    results |= {
        "n": len(labels),
        "tokens": len(flat),
        "wrong_share": float(flat.mean()),
        "excluded": written["excluded"],
        "settings": dataclasses.asdict(run.rows) | {"model": run.model},
    }
    write_json(folder / "results.json", results)


def _read_tokens(path: Path) -> dict[str, Any]:
    """What `ask_reward_model` wrote."""
    row = {"wrong": [int], "edited": [int], "probabilities": [NUMBER]}
    written: dict[str, Any] = read_json(path, {"rows": [row], "excluded": {str: int}})
    for number, found in enumerate(written["rows"], 1):
        if len({len(found[name]) for name in row}) > 1:
            raise PipelineError(f"{path}: row {number} has not one value of each kind a token")
    return written


def _weights(row: dict[str, Any], kind: Any, threshold: float) -> np.ndarray:
    if kind == "edit":
        return np.array(row["edited"], float)
    return probability_weights(np.array(row["probabilities"]), kind, threshold)
