"""The comparison as a table, in the terminal and in Markdown."""

from __future__ import annotations

import statistics
from typing import Any

from lit_align.pipelines.training_bench.methods import METHODS
from lit_align.pipelines.training_bench.record import Record, Summary, device_name
from lit_align.report.tables import Table, format_cell

MARKDOWN_FILE = "training.md"


def table(record: Record) -> Table:
    """A row for every method; ratios are to the baseline."""
    base = record.baseline()
    rows = [_row(summary, base) for summary in record.summaries()]
    settings = record.plan.settings
    mean_tokens = statistics.fmean(record.timed_tokens)
    note = (
        f"{device_name(settings.device)}, {settings.threads} threads, "
        f"{settings.pairs_per_step} pairs a step, max_length {settings.max_length}, fp32; medians "
        f"of {settings.rounds} runs in turns, {settings.steps} steps each after "
        f"{settings.warmup_steps}. Tokens: prompt + chosen and prompt + rejected of each pair. "
        f"A timed pair has {mean_tokens:,.0f} of them in the mean. With ref.: the reference's pass "
        "before training counted once. Above: without the imports."
    )
    return Table.from_records("DPO on the same pairs", rows, note)


def _row(summary: Summary, base: Summary | None) -> dict[str, Any]:
    speed = peak = {}
    if base is not None:
        speed = {f"speed x {base.method}": summary.pairs_per_s / base.pairs_per_s}
        peak = {f"peak x {base.method}": summary.peak_mib / base.peak_mib}
    return {
        "method": METHODS[summary.method].label,
        "pairs/s": summary.pairs_per_s,
        **speed,
        "with ref.": summary.pairs_per_s_with_reference,
        "tokens/s": summary.tokens_per_s,
        "step s": summary.step_s,
        "ref. s/pair": summary.reference_s,
        "peak MiB": summary.peak_mib,
        **peak,
        "above": summary.peak_above_imports_mib,
        "optimizer MiB": summary.optimizer_mib,
        "checkpoint MiB": summary.checkpoint_mib,
        "trained": summary.trained_parameters,
        "last loss": summary.losses[-1],
    }


def markdown(record: Record) -> str:
    """The table, the proof, what was left out, and the loss at every step."""
    found = table(record)
    steps = len(record.measurements[0][1].losses)
    losses = Table(
        "Loss at each step",
        ("method", *(str(step) for step in range(steps))),
        tuple((METHODS[s.method].label, *s.losses) for s in record.summaries()),
    )
    said = [f"# {found.title}", "", *_lines(found), "", found.note, ""]
    if record.proof is not None:
        said += [f"Proof {record.proof}: {'holds' if record.proof.holds else 'RED'}.", ""]
    said += [f"- {METHODS[n].label} is left out: {why}" for n, why in record.plan.left_out.items()]
    return "\n".join([*said, f"## {losses.title}", "", *_lines(losses)]) + "\n"


def _lines(shown: Table) -> list[str]:
    rule = ["---:" if shown.is_numeric(i) else "---" for i in range(len(shown.columns))]
    rows = [shown.columns, rule, *(map(format_cell, row) for row in shown.rows)]
    return ["| " + " | ".join(row) + " |" for row in rows]
