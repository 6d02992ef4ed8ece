"""What an ILA run comes to: the table of variants, `results.json`, and the HTML report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lit_align.errors import PipelineError
from lit_align.localizers.layer_gate import LayerScores, read_scores
from lit_align.masks import ParameterMask
from lit_align.masks.compare import Comparison
from lit_align.pipelines.ila.data import Layers
from lit_align.pipelines.ila.notes import all_notes
from lit_align.pipelines.ila.run import TRANSFERRED, ILARun
from lit_align.pipelines.ila.stages import OVERLAP_FILE, TRANSFER_FILE, mask_file, stability_file
from lit_align.pipelines.ila.variants import Choice, choices
from lit_align.pipelines.manifest import StageRecord
from lit_align.pipelines.rows import NUMBER, NUMBER_OR_NONE, read_json, write_json
from lit_align.pipelines.run_tables import (
    BASE_METRICS,
    VARIANT_METRICS,
    input_fingerprints,
    over_seeds,
    stages_table,
)
from lit_align.report import Table, format_table, library_versions, write_report
from lit_align.report.figures import Curves, HeatMap, Histogram, read_metrics_csv
from lit_align.report.mask_figures import jaccard_figure, layer_figure

Results = dict[str, Any]

STABILITY = {"stable": bool, "steps": int, "epsilon": NUMBER, "window": int, "warmup_steps": int}
OVERLAP = {
    "level": str, "names": [str], "units": int, "counts": [int], "jaccard": [[NUMBER_OR_NONE]],
    "random": [[NUMBER_OR_NONE]], "share": NUMBER,
}  # fmt: skip
TRANSFER = {"scores": {str: NUMBER}, "unmatched": [str], "unused": [str]}


def summarise(run: ILARun, records: Mapping[str, StageRecord]) -> Results:
    """Print the table, write `results.json` and `report.html`; returns what the former holds."""
    layers = Layers.read(run)
    scores = {r.name: read_scores(r.file) for r in run.every_ranking()}
    results: Results = {
        "base": read_json(run.output / "base" / "metrics.json", BASE_METRICS),
        "variants": {c.name: _variant(run, c, layers) for c in choices(run)},
        "rankings": {name: _ranking(found) for name, found in scores.items()},
        "overlap": _overlaps(run.output / "masks" / OVERLAP_FILE),
        "stage1": _stability(run),
    }
    if run.use.transfer:
        results[TRANSFERRED] = read_json(run.output / "masks" / TRANSFER_FILE, TRANSFER)
    results["notes"] = all_notes(results)
    write_json(run.output / "results.json", results)
    table = variants_table(results, run)
    report = _report(run, records, results, table, scores, layers)
    print(format_table(table))
    print("\n".join(["", *results["notes"]]))
    print(f"\nmasks   {run.output / 'masks'}\nreport  {report}")
    return results


def _stability(run: ILARun) -> Results:
    """What stage 1 says of itself, by data set, where it looked for stability."""
    files = {dataset: stability_file(run, dataset) for dataset in run.fine_tuned}
    return {
        dataset: read_json(file, STABILITY) for dataset, file in files.items() if file.is_file()
    }


def _overlaps(path: Path) -> Results:
    """The comparisons of rankings, by title."""
    found: Results = read_json(path, {str: OVERLAP})
    for title, comparison in found.items():
        matrices = comparison["jaccard"], comparison["random"]
        lists = [comparison["counts"], *matrices, *(row for m in matrices for row in m)]
        if {len(each) for each in lists} != {len(comparison["names"])}:
            raise PipelineError(f"{path}: {title!r:.80} has not one row and column for each name")
    return found


def _variant(run: ILARun, choice: Choice, layers: Layers) -> Results:
    """A row of the table: means over the seeds."""
    runs = [read_json(f / "metrics.json", VARIANT_METRICS) for f in run.tune_folders(choice.name)]
    return {
        "label": choice.label,
        "method": choice.method,
        "layers": _layers_trained(run, choice, layers),
    } | over_seeds(runs)


def _layers_trained(run: ILARun, choice: Choice, layers: Layers) -> int:
    mask = mask_file(run, choice)
    if mask is None:
        return len(layers.names)
    selections = ParameterMask.load(mask).selections
    return sum(selections[name].count() > 0 for name in layers.names)


def _ranking(scores: LayerScores) -> Results:
    said = {
        "layers": len(scores.layers), "steps": scores.steps, "loss": scores.loss,
        "initial_score": scores.initial_score, "spread": scores.spread, "ties": scores.ties,
        "saturated": scores.saturated, "saturated_share": scores.saturated_share,
        "unscored": list(scores.unscored), "scores": scores.layers,
    }  # fmt: skip
    return said


# ---- tables ----------------------------------------------------------------------------------


def variants_table(results: Results, run: ILARun) -> Table:
    """The table that people read."""
    unit = "nats a token" if run.data.objective == "sft" else "nats a pair"
    columns = ["variant", "layers", "trained parameters", f"validation loss ({unit})"]
    columns += ["lowest", "highest"] if run.use.seeds > 1 else []
    before = results["base"]["validation_loss"]
    missing = [None] * (len(columns) - 4)
    rows: list[tuple[Any, ...]] = [("before training", 0, 0, before, *missing, None, None)]
    for v in results["variants"].values():
        spread = [v["lowest"], v["highest"]] if run.use.seeds > 1 else []
        peak = v["peak_rss_mib"] and round(v["peak_rss_mib"])
        rows.append(
            (v["label"], v["layers"], v["trained_parameters"], v["validation_loss"], *spread,
             round(v["seconds"], 1), peak)
        )  # fmt: skip
    return Table(
        f"Validation loss on {results['base']['validation_rows']} rows",
        (*columns, "seconds of training", "peak MiB"),
        tuple(rows),
    )


def overlap_tables(results: Results, share: float) -> Iterator[Table]:
    """Jaccard indices of the top layers, between data sets and between milestones."""
    for title, found in results["overlap"].items():
        names = found["names"]
        rows = [
            (name, *(values[i] for i in range(len(names))), found["counts"][row])
            for row, (name, values) in enumerate(zip(names, found["jaccard"], strict=True))
        ]
        random = [v for values in found["random"] for v in values if v is not None]
        yield Table(
            f"Overlap of the top {100 * share:g} % of the layers: {title}",
            ("Jaccard index", *names, "layers"),
            tuple(rows),
            note=_expected(random),
        )


def _expected(random: list[float]) -> str:
    if not random:
        return ""
    low, high = min(random), max(random)
    value = f"{low:.2f}" if high - low < 0.005 else f"{low:.2f} to {high:.2f}"
    return f"Random rankings would have {value}."


def _ranking_table(results: Results) -> Table:
    rows = [
        (name, r["layers"], r["steps"], r["initial_score"], r["spread"], r["ties"],
         r["saturated_share"])
        for name, r in results["rankings"].items()
    ]  # fmt: skip
    columns = ("ranking", "layers", "steps", "s_0", "largest − smallest s", "ties",
               "saturated share")  # fmt: skip
    return Table("Rankings", columns, tuple(rows))


# ---- the report ------------------------------------------------------------------------------


def _report(
    run: ILARun,
    records: Mapping[str, StageRecord],
    results: Results,
    table: Table,
    scores: Mapping[str, LayerScores],
    layers: Layers,
) -> Path:
    overlaps = overlap_tables(results, run.use.compare_share)
    return write_report(
        run.output / "report.html",
        title="ILA: important layers, and only those trained",
        tables=[table, *overlaps, _ranking_table(results), stages_table(records)],
        figures=_figures(results, scores, run.use.compare_share),
        curves=_curves(run),
        config={name: r.config for name, r in records.items()},
        versions=library_versions(),
        fingerprints={"model": layers.base_fingerprint}
        | _mask_digests(run)
        | input_fingerprints(records),
        notes=results["notes"],
    )


def _mask_digests(run: ILARun) -> dict[str, str]:
    files = {choice.name: mask_file(run, choice) for choice in choices(run)}
    return {f"mask {n}": ParameterMask.load(f).digest for n, f in files.items() if f is not None}


def _figures(
    results: Results, scores: Mapping[str, LayerScores], share: float
) -> list[HeatMap | Histogram]:
    """Ranks of all layers and the top ones, by ranking; then how much the tops overlap."""
    rankings: dict[str, Mapping[str, float]] = {n: found.layers for n, found in scores.items()}
    if TRANSFERRED in results:
        rankings[TRANSFERRED] = results[TRANSFERRED]["scores"]
    figures: list[HeatMap | Histogram] = []
    for name, layers in rankings.items():
        figures.append(layer_figure(layers, f"{name}: rank of each layer"))
        title = f"{name}: the top {100 * share:g} % of the layers"
        figures.append(layer_figure(layers, title, ratio=share))
    for title, comparison in results["overlap"].items():
        figures.append(
            jaccard_figure(
                Comparison(**{name: comparison[name] for name in OVERLAP}),
                f"Jaccard index: {title}",
            )
        )
    return figures


def _curves(run: ILARun) -> list[Curves]:
    """Loss of every training: of stage 1, of the gates, of the variants (the first seed)."""
    trainings = {
        "Stage 1": {dataset: run.output / f"change_{dataset}" for dataset in run.fine_tuned},
        "Stage 2": {r.name: run.output / r.stage for r in run.every_ranking() if r.stage},
        "Variants": {c.label: run.tune_folders(c.name)[0] for c in choices(run)},
    }
    drawn = []
    for title, folders in trainings.items():
        logs = {name: folder / "logs" / "metrics.csv" for name, folder in folders.items()}
        found = {name: read_metrics_csv(file) for name, file in logs.items() if file.is_file()}
        series = {name: points["loss"] for name, points in found.items() if "loss" in points}
        if series:
            drawn.append(Curves(f"{title}: training loss", "loss", series))
    return drawn
