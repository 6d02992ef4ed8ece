"""What the reports of all pipelines say of a run's stages and of the files that it read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lit_align.pipelines.manifest import StageRecord
from lit_align.pipelines.rows import NUMBER, NUMBER_OR_NONE
from lit_align.report import Table

# Of `metrics.json`, which each training of a variant writes, and the measuring of the base.
VARIANT_METRICS = {
    "seed": int, "validation_loss": NUMBER_OR_NONE, "train_loss": NUMBER_OR_NONE,
    "trained_parameters": int, "seconds": NUMBER, "peak_rss_mib": NUMBER_OR_NONE,
}  # fmt: skip
BASE_METRICS = {"validation_loss": NUMBER_OR_NONE, "validation_rows": int}


def stages_table(records: Mapping[str, StageRecord]) -> Table:
    """How long each stage took, and the memory of the process while it ran."""
    rows = tuple(
        (r.name, round(r.seconds, 1), r.peak_rss_mib and round(r.peak_rss_mib))
        for r in records.values()
    )
    return Table("Stages", ("stage", "seconds", "peak MiB"), rows)


def over_seeds(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over one variant's runs, which differ in their seed; each is a `metrics.json`."""
    losses = [r["validation_loss"] for r in runs if r["validation_loss"] is not None]
    peaks = [r["peak_rss_mib"] for r in runs if r["peak_rss_mib"] is not None]
    return {
        "trained_parameters": round(sum(r["trained_parameters"] for r in runs) / len(runs)),
        "validation_loss": sum(losses) / len(losses) if losses else None,
        "lowest": min(losses, default=None),
        "highest": max(losses, default=None),
        "validation_losses": losses,
        "train_losses": [r["train_loss"] for r in runs],
        "seeds": [r["seed"] for r in runs],
        "seconds": sum(r["seconds"] for r in runs) / len(runs),
        "peak_rss_mib": max(peaks, default=None),
    }


def input_fingerprints(records: Mapping[str, StageRecord]) -> dict[str, str]:
    """SHA-256 of every file and folder that the stages read from outside the run."""
    found = (given for record in records.values() for given in record.inputs)
    return {given["path"]: given["sha256"] for given in found if "path" in given}
