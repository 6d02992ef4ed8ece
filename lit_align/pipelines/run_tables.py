"""What the reports of all pipelines say of a run's stages and of the files that it read."""

from __future__ import annotations

from collections.abc import Mapping

from lit_align.pipelines.manifest import StageRecord
from lit_align.report import Table


def stages_table(records: Mapping[str, StageRecord]) -> Table:
    """How long each stage took, and the memory of the process while it ran."""
    rows = tuple(
        (r.name, round(r.seconds, 1), r.peak_rss_mib and round(r.peak_rss_mib))
        for r in records.values()
    )
    return Table("Stages", ("stage", "seconds", "peak MiB"), rows)


def input_fingerprints(records: Mapping[str, StageRecord]) -> dict[str, str]:
    """SHA-256 of every file and folder that the stages read from outside the run."""
    found = (given for record in records.values() for given in record.inputs)
    return {given["path"]: given["sha256"] for given in found if "path" in given}
