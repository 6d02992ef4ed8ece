"""The pairs as every method takes them: token ids, in one order."""

from __future__ import annotations

import json
from pathlib import Path

from lit_align.pipelines.training_bench.job import Job

Pair = dict[str, list[int]]  # prompt_ids, chosen_ids, rejected_ids


def read_pairs(job: Job) -> list[Pair]:
    """The first pairs of the file, as many as the run goes through."""
    with Path(job.pairs).open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(job.num_pairs), strict=False)]
