"""What a pipeline's run comes to: a table, `results.json`, and the HTML report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from lit_align.masks import ParameterMask
from lit_align.pipelines.manifest import StageRecord
from lit_align.pipelines.rows import NUMBER, read_json, write_json
from lit_align.pipelines.run_tables import input_fingerprints, stages_table
from lit_align.pipelines.workbench.files import Architecture
from lit_align.report import Table, format_interval, format_table, library_versions, write_report
from lit_align.report.figures import Curves, read_metrics_csv
from lit_align.report.mask_figures import mask_figures
from lit_align.report.mask_tables import block_table, module_table

COLUMNS = ("model", "accuracy [95 % interval]", "trained parameters", "peak MiB", "seconds")
METRICS = {"accuracy": NUMBER, "low": NUMBER, "high": NUMBER, "n": int}
STAGES = {"sft": ("sft",), "dpo": ("warm_up",), "allo": ("forget", "improve")}
NAMES = {
    "base": "base",
    "sft": "SFT",
    "dpo": "full DPO (the warm-up)",
    "allo": "ALLO",
}


class Run(Protocol):
    """What the summary needs of a pipeline."""

    @property
    def output(self) -> Path:
        """Folder of the run."""

    @property
    def start(self) -> Path:
        """Folder of the model that the masks were located on."""


def summarise(run: Run, records: Mapping[str, StageRecord]) -> dict[str, Any]:
    """Print the table, write `results.json` and `report.html`; returns the table's rows."""
    mask = ParameterMask.load(run.output / "export" / "mask.safetensors")
    results = {
        name: _row(run.output, name, records, mask)
        for name in NAMES
        if f"evaluate_{name}" in records
    }
    write_json(run.output / "results.json", results)
    table = results_table(results, mask)
    report = _report(run, records, table, mask)
    print(format_table(table))
    print(f"\nmask and delta  {run.output / 'export'}\nreport          {report}")
    return results


def _row(
    output: Path, name: str, records: Mapping[str, StageRecord], mask: ParameterMask
) -> dict[str, Any]:
    metrics = read_json(output / f"evaluate_{name}" / "metrics.json", METRICS)
    stages = [records[s] for s in STAGES.get(name, ()) if s in records]
    peaks = [r.peak_rss_mib for r in stages if r.peak_rss_mib is not None]
    trained = {"base": 0, "allo": mask.count()}.get(name, mask.total())
    chosen = ("accuracy", "low", "high", "n", "accuracy_raw", "accuracy_per_token", "by_source")
    return {k: metrics[k] for k in chosen if k in metrics} | {
        "trained_parameters": trained,
        "peak_rss_mib": max(peaks, default=None),
        "train_seconds": sum(r.seconds for r in stages) if stages else None,
    }


def results_table(results: Mapping[str, Mapping[str, Any]], mask: ParameterMask) -> Table:
    """The table that people read."""
    rows = [
        (
            NAMES[name],
            format_interval(r["accuracy"], r["low"], r["high"]),
            r["trained_parameters"],
            r["peak_rss_mib"] and round(r["peak_rss_mib"]),
            r["train_seconds"] and round(r["train_seconds"]),
        )
        for name, r in results.items()
    ]
    n = next(iter(results.values()))["n"]
    return Table(f"Held-out accuracy on {n} rows", COLUMNS, tuple(rows), note=_note(results, mask))


def _note(results: Mapping[str, Mapping[str, Any]], mask: ParameterMask) -> str:
    dpo, best = results["dpo"], results["allo"]
    overlap = dpo["low"] <= best["high"] and best["low"] <= dpo["high"]
    ranking = (
        "The intervals of ALLO and full DPO overlap: these rows cannot rank the two."
        if overlap
        else "The intervals of ALLO and full DPO do not overlap."
    )
    return (
        f"{ranking} ALLO moved {mask.density():.1%} of the parameters; its seconds are those of "
        "forgetting and improving, and finding its mask took the warm-up run besides. Peak memory "
        "is the process's while the stage ran."
    )


def _report(
    run: Run, records: Mapping[str, StageRecord], table: Table, mask: ParameterMask
) -> Path:
    sizes = _sizes(run)
    return write_report(
        run.output / "report.html",
        title="ALLO: key neurons, forgetting, improving",
        tables=[
            table,
            sizes,
            _mask_table(run, mask),
            stages_table(records),
            block_table(mask),
            module_table(mask),
        ],
        figures=mask_figures(mask, Architecture.read(str(run.start)).heads, "What moved, N1 ∪ N2"),
        curves=_curves(run.output),
        config={name: r.config for name, r in records.items()},
        versions=library_versions(),
        fingerprints={
            "start model": str(mask.metadata.base_fingerprint),
            "mask": mask.digest,
        }
        | input_fingerprints(records),
    )


def _sizes(run: Run) -> Table:
    weights = sum(f.stat().st_size for f in run.start.glob("*.safetensors"))
    rows = [("start model", weights / 2**20, 1.0)]
    for name in ("mask.safetensors", "delta.safetensors"):
        size = (run.output / "export" / name).stat().st_size
        rows.append((name, size / 2**20, size / weights))
    return Table("Files", ("file", "MiB", "share of the model"), tuple(rows))


def _mask_table(run: Run, union: ParameterMask) -> Table:
    files = {name: run.output / "locate" / f"{name.lower()}.safetensors" for name in ("N1", "N2")}
    masks = {name: ParameterMask.load(file) for name, file in files.items() if file.is_file()}
    rows = [
        (name, m.metadata.method, m.metadata.ratio, m.count(), m.total(), m.density())
        for name, m in (masks | {"N1 ∪ N2": union}).items()
    ]
    columns = ("mask", "method", "ratio asked", "selected", "total", "realised ratio")
    return Table("Masks", columns, tuple(rows))


def _curves(output: Path) -> list[Curves]:
    """Loss of every training stage, and what DPO says of its pairs."""
    found = {}
    for stage in ("sft", "reward_model", "warm_up", "forget", "improve"):
        path = output / stage / "logs" / "metrics.csv"
        if path.is_file():
            found[stage] = read_metrics_csv(path)
    wanted = {
        "loss": "loss",
        "rewards/accuracies": "share of pairs",
        "rewards/margins": "nats × beta",
        "train/tokens_per_second": "tokens a second",
    }
    curves = []
    for metric, label in wanted.items():
        series = {stage: points[metric] for stage, points in found.items() if metric in points}
        if series:
            curves.append(Curves(metric, label, series))
    return curves
