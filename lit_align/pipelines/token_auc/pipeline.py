"""How well token weights find what people marked as wrong: the AUC of each kind of weight.

A reward model is trained on the human corrections of some rows (the rewriting task of `rewriting`)
and asked about the others; `edit` weights come from those rows' own corrections.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from lit_align.data.templates import chat_template_text
from lit_align.gguf_alias import ALIAS
from lit_align.language_model import resolve_model
from lit_align.pipelines.rows import NUMBER, read_json, write_json
from lit_align.pipelines.settings import RunSettings, TrainSettings
from lit_align.pipelines.stage import Stage, run_stages
from lit_align.pipelines.token_auc import stages
from lit_align.pipelines.token_auc.stages import KINDS, TokenAucRun, TokenAucSettings
from lit_align.pipelines.training import as_config

ESTIMATE = {"value": NUMBER, "low": NUMBER, "high": NUMBER}
RESULTS = {kind: {"pooled": ESTIMATE, "by_row": ESTIMATE} for kind in KINDS} | {
    "n": int, "tokens": int, "wrong_share": NUMBER, "excluded": {str: int},
    "settings": {"train": bool, "train_rows": int},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RewardTrainSettings(TrainSettings):
    """The reward model's training, shorter than ALLO's: there are few rows."""

    learning_rate: float = 2e-5
    batch_size: int = 4
    warmup_ratio: float = 0.03


def token_weight_auc(
    data: str,
    output: str,
    model: str = ALIAS,
    chat_template: str | None = None,
    rows: TokenAucSettings = TokenAucSettings(),
    train: RewardTrainSettings = RewardTrainSettings(),
    run: RunSettings = RunSettings(),
) -> dict[str, Any]:
    """Measure token weights against human error spans; stages that are done are skipped.

    `edit`: 1 on tokens that the row's correction substitutes or deletes; p_t being the reward
    model's probability of a token, `binary`: p_t < threshold; `soft`: 1 − p_t; `raw`: p_t, the
    weight of ALLO's public script. Each is taken as a score of "this token is wrong", so that `raw`
    has one minus the AUC of `soft`. 0.5 is chance.

    Args:
        data: rows with `question`, `gold`, `predictions`, `errors` (character spans of
            predictions[0]) and `corrected`: JSONL, JSON, Parquet or CSV.
        output: folder of the run; `results.json` is the result.
        model: what the reward model is trained from: local folder, hub id or alias.
        chat_template: in place of the tokenizer's own: `transcript`, a file's path, or Jinja text.
        rows: which rows, and how they are measured.
        train: the reward model's training.
        run: precision, device, seed.

    Returns:
        What stands in `results.json`: for each kind the AUC over all tokens (`pooled`) and the mean
        of the rows' own (`by_row`), each with a 95 % bootstrap interval over rows, and `n` rows,
        `tokens`, `wrong_share`, and the rows that were `excluded`, by reason.

    Raises:
        DataError: bad rows, or none that can be measured.
    """
    this = TokenAucRun(Path(output), data, model, chat_template, rows, train, run)
    inputs: list[Path | str] = [Path(data), resolve_model(model)]
    template = None if chat_template is None else chat_template_text(chat_template)
    split = {"seed": rows.seed, "train_rows": rows.train_rows, "chat_template": template}
    listed = []
    if rows.train:
        config = as_config(train, run) | split | {"identity_rows": rows.identity_rows}
        learn = partial(stages.train_reward_model, this)
        listed.append(Stage("reward_model", config, inputs, learn))
        inputs = [*inputs, "reward_model"]
    config = split | {"test_rows": rows.test_rows, "max_length": train.max_length}
    listed.append(Stage("probabilities", config, inputs, partial(stages.ask_reward_model, this)))
    config = as_config(rows)
    listed.append(Stage("auc", config, ["probabilities"], partial(stages.measure, this)))
    run_stages(listed, output)
    results = read_json(this.output / "auc" / "results.json", RESULTS)
    write_json(this.output / "results.json", results)
    print(table(results))
    return results


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = ["| weight | AUC of all tokens | mean of the rows' AUCs |", "|---|---|---|"]
    for kind in KINDS:
        cells = ("{value:.3f} [{low:.3f}, {high:.3f}]".format(**results[kind][x])
                 for x in ("pooled", "by_row"))  # fmt: skip
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    excluded = ", ".join(f"{count} {reason}" for reason, count in results["excluded"].items())
    settings = results["settings"]
    trained = (
        f"trained on {settings['train_rows']} other rows" if settings["train"] else "untrained"
    )
    lines.append(
        f"\n{results['n']} rows, {results['tokens']} tokens, {results['wrong_share']:.1%} of them "
        f"in error spans; reward model {trained}; excluded: "
        f"{excluded or 'none'}"
    )
    return "\n".join(lines)
