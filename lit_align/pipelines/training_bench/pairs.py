"""The pairs that are trained on: token ids, once, so that nobody tokenises differently."""

from __future__ import annotations

import json
from pathlib import Path

from lit_align.data import PreferenceDataModule
from lit_align.errors import BenchmarkError
from lit_align.files import write_atomically
from lit_align.pipelines.training_bench.settings import BenchSettings

PAIRS_FILE = "pairs.jsonl"
SIDES = ("chosen_ids", "rejected_ids")


def write_pairs(settings: BenchSettings, folder: Path) -> None:
    """The first pairs of the data that are not longer than `max_length`, in the file's order.

    What could not be used stands in `rejected_rows.jsonl`.

    Raises:
        BenchmarkError: there are not enough.
        DataError: the file cannot be read as pairs.
    """
    data = PreferenceDataModule(
        settings.model,
        train_file=settings.data,
        chat_template=settings.chat_template,
        max_length=settings.max_length,
        truncation="error",
        on_bad_row="skip",
        output_dir=str(folder),
        max_rows=settings.num_pairs,
    )
    data.setup("fit")
    if len(data.train_rows) < settings.num_pairs:
        raise BenchmarkError(
            f"{settings.data} has {len(data.train_rows)} pairs of at most {settings.max_length} "
            f"tokens, and {settings.num_pairs} are needed: take fewer --steps, --follow or "
            "--mask-steps"
        )
    lines = []
    for row in data.train_rows:
        pair = {"prompt_ids": row.sequences[0].prompt_ids.tolist()}
        pair |= {
            side: s.response_ids.tolist() for side, s in zip(SIDES, row.sequences, strict=True)
        }
        lines.append(json.dumps(pair) + "\n")
    write_atomically(folder / PAIRS_FILE, "".join(lines).encode())


def tokens_of_pairs(path: Path) -> list[int]:
    """Real tokens of each pair: prompt and chosen, prompt and rejected."""
    pairs = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [2 * len(p["prompt_ids"]) + sum(len(p[side]) for side in SIDES) for p in pairs]
