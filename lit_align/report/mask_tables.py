"""Tables of masks: facts, blocks, modules, parameters, heads, and Jaccard matrices."""

from __future__ import annotations

import numpy as np

from lit_align.masks import HeadLayout, ParameterMask
from lit_align.masks.compare import Comparison
from lit_align.masks.head_sets import attention_shares
from lit_align.masks.membership import head_shares, linear_weight_names
from lit_align.report.tables import Table

COUNTS = ("selected", "total", "realised ratio")
OUTSIDE = "outside the blocks"
PARTLY = ("rows", "elements")
MAX_FACT = 200  # letters


def facts_table(mask: ParameterMask, title: str = "Mask") -> Table:
    """What a mask says about itself, and what it comes to."""
    metadata = mask.metadata
    layers = [mask.selections[name] for name in linear_weight_names(mask)]
    whole, partly = (sum(s.kind in kinds for s in layers) for kinds in (("all",), PARTLY))
    rows: list[tuple[str, object]] = [
        ("method", metadata.method),
        ("granularity", metadata.granularity),
        ("scope", metadata.scope),
        ("ratio asked", metadata.ratio),
        ("ratio realised, of all entries", mask.density()),
        ("entries selected", mask.count()),
        ("entries in all", mask.total()),
        ("linear layers", len(layers)),
        ("of these wholly selected", whole),
        ("of these partly selected", partly),
        ("base fingerprint", metadata.base_fingerprint),
        ("digest", mask.digest),
    ]
    rows += [(key, _shortened(str(value))) for key, value in metadata.extra.items()]
    return Table(title, ("", "value"), tuple(rows))


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_FACT else f"{text[:MAX_FACT]}..."


def block_table(mask: ParameterMask) -> Table:
    """One row a transformer block; what is outside the blocks comes first."""
    rows = [
        (OUTSIDE if r["block"] is None else r["block"], r["selected"], r["total"], r["ratio"])
        for r in mask.layer_table()
    ]
    return Table("By block", ("block", *COUNTS), tuple(rows))


def module_table(mask: ParameterMask) -> Table:
    """One row a module, summed over the blocks."""
    sums: dict[str, list[int]] = {}
    for row in mask.table():
        found = sums.setdefault(row["module"], [0, 0, 0])
        found[0] += 1
        found[1] += row["selected"]
        found[2] += row["total"]
    rows = tuple((m, n, s, t, s / t if t else None) for m, (n, s, t) in sums.items())
    return Table("By module", ("module", "parameters", *COUNTS), rows)


def parameter_table(mask: ParameterMask) -> Table:
    """One row a parameter."""
    rows = []
    for r in mask.table():
        kind = mask.selections[r["name"]].kind
        rows.append((r["name"], r["shape"], kind, r["selected"], r["total"], r["ratio"]))
    return Table("By parameter", ("parameter", "shape", "kind", *COUNTS), tuple(rows))


def head_table(mask: ParameterMask, heads: HeadLayout) -> Table:
    """One row a block: its wholly selected query heads, and the mean share of all."""
    rows = []
    for index, shares in head_shares(mask, heads).items():
        whole = np.flatnonzero(shares == 1.0)
        named = ", ".join(map(str, whole)) or None
        block = heads.block_number(int(index))
        rows.append((block, named, len(whole), len(shares), float(shares.mean())))
    of_attention = attention_shares(heads, mask)
    note = "Of the entries of " + ", ".join(f"{k}: {v:.2%}" for k, v in of_attention.items())
    if heads.heads_per_group > 1:
        note += f". {heads.heads_per_group} query heads share each group of keys and values"
    return Table(
        "By attention head",
        ("block", "whole heads", "how many", "of", "mean share"),
        tuple(rows),
        note=f"{note}. The share of a head is the least of those of its q, k and v.",
    )


def jaccard_table(comparison: Comparison, title: str = "") -> Table:
    """The Jaccard matrix, beside each index that of random sets of the same sizes."""
    rows = []
    for i, name in enumerate(comparison.names):
        count = comparison.counts[i]
        cells = map(_index, comparison.jaccard[i], comparison.random[i])
        rows.append((name, count, count / comparison.units if comparison.units else None, *cells))
    units = f"{comparison.level}s"
    note = (
        f"Over {comparison.units:,} {units}. In brackets: the expected index of two random sets of "
        "the same sizes."
    )
    if comparison.level != "element":
        note += f" A {comparison.level} belongs to a mask from a share of {comparison.share:g} on."
    empty = [name for name, n in zip(comparison.names, comparison.counts, strict=True) if not n]
    if empty:
        note += f" No {comparison.level} belongs to {', '.join(empty)}: lower the share."
    title = title or f"Jaccard index, by {comparison.level}"
    return Table(title, ("mask", units, "share", *comparison.names), tuple(rows), note)


def _index(jaccard: float | None, random: float | None) -> str | None:
    if jaccard is None:
        return None
    return f"{jaccard:.3f}" if random is None else f"{jaccard:.3f} ({random:.3f})"
