"""What an ALPS run comes to: the table of variants, `results.json`, and the HTML report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lit_align.errors import PipelineError
from lit_align.localizers.stored import meta_model
from lit_align.masks import HeadLayout, ParameterMask
from lit_align.pipelines.alps.run import LABELS, ALPSRun
from lit_align.pipelines.alps.stages import HEADS_FILE
from lit_align.pipelines.manifest import StageRecord
from lit_align.pipelines.rows import NUMBER, read_json, write_json
from lit_align.pipelines.run_tables import (
    BASE_METRICS,
    VARIANT_METRICS,
    input_fingerprints,
    over_seeds,
    stages_table,
)
from lit_align.report import Table, format_table, library_versions, write_report
from lit_align.report.figures import Curves, read_metrics_csv
from lit_align.report.mask_figures import mask_figures

Results = dict[str, Any]


def summarise(run: ALPSRun, records: Mapping[str, StageRecord]) -> Results:
    """Print the table, write `results.json` and `report.html`; returns what the former holds."""
    heads = _read_heads(run)
    results: Results = {
        "base": read_json(run.output / "base" / "metrics.json", BASE_METRICS),
        "variants": {name: _variant(run, name, heads) for name in run.variants()},
        "heads": heads,
    }
    results["notes"] = list(notes(run, results))
    write_json(run.output / "results.json", results)
    table = variants_table(results, run)
    report = _report(run, records, results, table)
    print(format_table(table))
    print("\n".join(["", *results["notes"]]))
    print(f"\nheads   {run.mask('alps')}\nreport  {report}")
    return results


def _read_heads(run: ALPSRun) -> Results:
    """What `choose_heads` wrote: the masks of this run have to be there, and their heads to exist.

    Raises:
        PipelineError: they do not.
    """
    shares = dict.fromkeys(("q", "k", "v", "qkv"), NUMBER)
    mask = {"heads": {str: [int]}, "count": int, "shares": shares}
    names = ["alps", *(t.mask for t in run.tunings() if t.mask is not None)]
    form = {
        "num_heads": int, "num_kv_heads": int, "total_heads": int, "blocks": [object],
        "projections": [str], "scores": (dict, type(None)), "masks": dict.fromkeys(names, mask),
    }  # fmt: skip
    path = run.output / "heads" / HEADS_FILE
    found: Results = read_json(path, form)
    blocks = {str(i): range(found["num_heads"]) for i in range(len(found["blocks"]))}
    chosen = found["masks"]["alps"]["heads"]
    exist = all(set(some) <= set(blocks.get(block, ())) for block, some in chosen.items())
    if found["scores"] is not None:
        check = {block: len(found["scores"].get(block, ())) for block in chosen}
        exist = exist and all(length == found["num_heads"] for length in check.values())
    if not exist:
        raise PipelineError(f"{path} names heads that the model does not have")
    return found


def _variant(run: ALPSRun, variant: str, heads: Results) -> Results:
    """A row of the table: means over the seeds."""
    tunings = [t for t in run.tunings() if t.variant == variant]
    runs = [read_json(run.output / t.stage / "metrics.json", VARIANT_METRICS) for t in tunings]
    masks = [heads["masks"][t.mask] for t in tunings if t.mask is not None]
    everything = {"count": heads["total_heads"], "shares": dict.fromkeys("qkv", 1.0) | {"qkv": 1.0}}
    if variant == "full" and not masks:
        masks = [everything]
    return {
        "label": LABELS[variant],
        "heads": masks[0]["count"] if masks else None,
        "attention_shares": _mean_shares([mask["shares"] for mask in masks]),
    } | over_seeds(runs)


def _mean_shares(shares: list[dict[str, float]]) -> dict[str, float] | None:
    """Of the masks of all seeds, which share keys and values in other ways."""
    if not shares:
        return None
    return {part: sum(each[part] for each in shares) / len(shares) for part in shares[0]}


def variants_table(results: Results, run: ALPSRun) -> Table:
    """The table that people read."""
    unit = "nats a token" if run.data.objective == "sft" else "nats a pair"
    spread = ("lowest", "highest") if run.compare.seeds > 1 else ()
    before = results["base"]["validation_loss"]
    missing = [None] * len(spread)
    rows: list[tuple[Any, ...]] = [("before training", 0, 0.0, 0, before, *missing, None, None)]
    for v in results["variants"].values():
        shares = v["attention_shares"]
        rows.append(
            (
                v["label"],
                v["heads"],
                shares and shares["qkv"],
                v["trained_parameters"],
                v["validation_loss"],
                *(v[name] for name in spread),
                round(v["seconds"], 1),
                v["peak_rss_mib"] and round(v["peak_rss_mib"]),
            )
        )
    columns = ("what trains", "heads", "share of q, k, v", "trained parameters")
    return Table(
        f"Validation loss on {results['base']['validation_rows']} rows",
        (*columns, f"validation loss ({unit})", *spread, "seconds of training", "peak MiB"),
        tuple(rows),
    )


def notes(run: ALPSRun, results: Results) -> Iterator[str]:
    """What the numbers are of, and what they do not show."""
    yield _on_heads(run, results["heads"])
    locate = run.locate
    rest = "train" if locate.others == "train" else "are frozen"
    yield (
        f"Weights outside attention {rest} in every variant but LoRA, and the output projection "
        f"({'trains' if (locate.o_proj or locate.others) == 'train' else 'is frozen'}) is no part "
        "of a head."
    )
    if "full" in run.compare.baselines and locate.others == "freeze":
        yield "“everything” trains all heads, and of the other weights what the run trains."
    elif "full" in run.compare.baselines and run.fine_tunes:
        yield "“everything” is the task model itself: the heads are those that its training moved."
    measured = [v for v in results["variants"].values() if v["validation_loss"] is not None]
    if run.compare.seeds == 1:
        yield (
            "Each variant was trained once: small differences between rows are not a ranking "
            "(compare.seeds trains more often)."
        )
    elif measured:
        best = min(measured, key=lambda v: v["validation_loss"])
        equals = [v for v in measured if v is not best and v["lowest"] <= best["highest"]]
        if equals:
            yield (
                f"The losses of “{best['label']}” over its seeds overlap with those of "
                f"{', '.join('“' + v['label'] + '”' for v in equals)}: these runs do not rank them."
            )


def _on_heads(run: ALPSRun, heads: Results) -> str:
    chosen = heads["masks"]["alps"]
    shares = {name: f"{100 * share:.1f} %" for name, share in chosen["shares"].items()}
    text = (
        f"{chosen['count']} of {heads['total_heads']} query heads were chosen "
        f"({shares['q']} of q); they are {shares['qkv']} of the parameters of q, k and v"
    )
    if heads["num_kv_heads"] < heads["num_heads"]:
        text += (
            f", since {heads['num_heads'] // heads['num_kv_heads']} query heads share their keys "
            f"and values, which train if one of them does ({shares['k']} of k, {shares['v']} of v)"
        )
    if run.heads is not None:
        text += f". They come from {run.heads}, not from these rows"
    return f"{text}."


def _report(
    run: ALPSRun, records: Mapping[str, StageRecord], results: Results, table: Table
) -> Path:
    mask = ParameterMask.load(run.mask("alps"))
    names = dict.fromkeys(t.mask for t in run.tunings() if t.mask is not None)
    fingerprints = {"model": str(mask.metadata.base_fingerprint)}
    if task := mask.metadata.extra.get("task_fingerprint"):
        fingerprints["task model"] = task
    return write_report(
        run.output / "report.html",
        title="ALPS: the attention heads that a task moves, and only those trained",
        tables=[
            table,
            _shares_table(results),
            _scores_table(results["heads"]),
            stages_table(records),
        ],
        figures=mask_figures(mask, HeadLayout.from_model(meta_model(run.base)), "ALPS"),
        curves=_curves(run),
        config={name: r.config for name, r in records.items()},
        versions=library_versions(),
        fingerprints=fingerprints
        | {f"mask {name}": ParameterMask.load(run.mask(name)).digest for name in names}
        | input_fingerprints(records),
        notes=results["notes"],
    )


def _shares_table(results: Results) -> Table:
    """The realised ratios of the attention parameters."""
    rows = [
        (v["label"], v["heads"], *(v["attention_shares"][part] for part in ("q", "k", "v", "qkv")))
        for v in results["variants"].values()
        if v["attention_shares"]
    ]
    columns = ("what trains", "heads", "share of q", "of k", "of v", "of q, k and v")
    return Table("Trained shares of the attention's parameters", columns, tuple(rows))


def _scores_table(heads: Results) -> Table:
    """The chosen heads, the furthest moved first."""
    chosen, scores = heads["masks"]["alps"]["heads"], heads["scores"] or {}
    rows = [
        (heads["blocks"][int(block)], head, scores[block][head] if scores else None)
        for block, some in chosen.items()
        for head in some
    ]
    rows.sort(key=lambda row: -(row[2] or 0.0))
    return Table("Chosen heads", ("block", "query head", "score"), tuple(rows))


def _curves(run: ALPSRun) -> list[Curves]:
    """Loss of every variant's first training."""
    logs = {
        t.variant: run.output / t.stage / "logs" / "metrics.csv"
        for t in run.tunings()
        if t.seed == run.machine.seed
    }
    found = {n: read_metrics_csv(file) for n, file in logs.items() if file.is_file()}
    series = {LABELS[n]: points["loss"] for n, points in found.items() if "loss" in points}
    return [Curves("Training loss", "loss", series)] if series else []
