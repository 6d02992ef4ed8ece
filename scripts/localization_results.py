"""The ILA and ALPS tables of docs/RESULTS.md: many small runs of one model, resumable.

    python scripts/localization_results.py --data ../shared/data --output runs/localization

Every run is a stage of a pipeline: kill the script and run it again, and it goes on after the last
run that was done. `--only PREFIX ...` makes those stages (and what they read) alone; `--tables`
prints what there is so far and runs nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from lit_align.callbacks.milestones import KeepMilestones, milestone_name
from lit_align.compact.adapters import AdapterSettings
from lit_align.language_model import load_tokenizer, resolve_model
from lit_align.localizers.head_distance import Representation, head_distance_mask
from lit_align.localizers.layer_gate import LayerScores, layer_gate_mask, read_scores
from lit_align.localizers.stored import meta_model, parameter_shapes
from lit_align.masks import HeadLayout, ParameterMask
from lit_align.masks.head_sets import (
    count_of_heads,
    head_set_mask,
    layer_consistent_heads,
    random_heads,
)
from lit_align.modules import ILAMaskLearning
from lit_align.pipelines.settings import RunSettings, TrainSettings
from lit_align.pipelines.stage import Stage, run_stages
from lit_align.pipelines.training import make_trainer
from lit_align.pipelines.variants import (
    TuneData,
    Variant,
    data_module,
    train_variant,
    validation_loss,
)

MODEL = "smollm2-135m-instruct-q4"
FILES = {"dolly": "sft_dolly.jsonl", "codegen": "sft_codegen.jsonl", "gsm8k": "gsm8k_train.jsonl"}
SEEDS = (0, 1, 2)
TRAIN_ROWS, VALIDATION_ROWS = 48, 24
LENGTH = 128
MILESTONES = (0.01, 0.25, 0.5, 0.75, 1.0)
INITIAL_SCORES = (4.0, 2.0, 1.0)
KEPT = 0.75  # of the layers, in the Jaccard tables
BETAS = (0.9, 0.99)  # the paper's, as are decay and schedule

FULL = TrainSettings(
    learning_rate=1e-4, epochs=1, batch_size=4, weight_decay=0.1, betas=BETAS, max_length=LENGTH
)
LORA = dataclasses.replace(FULL, learning_rate=1e-3)
GATES = dataclasses.replace(FULL, epochs=3, max_steps=32)
ADAPTER = AdapterSettings(rank=32, dropout=0.1)


def prepare_rows(source: Path, folder: Path) -> None:
    """Train and validation rows of every data set, as messages: the first that need no cut."""
    tokenizer = load_tokenizer(MODEL)
    for name, file in FILES.items():
        rows: list[str] = []
        for line in filter(None, (source / file).read_text("utf-8").split("\n")):
            row = json.loads(line)
            messages = row.get("messages") or _solved(row)
            if len(tokenizer.apply_chat_template(messages)["input_ids"]) <= LENGTH:
                rows.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
            if len(rows) == TRAIN_ROWS + VALIDATION_ROWS:
                break
        for split, part in (("train", rows[:TRAIN_ROWS]), ("validation", rows[TRAIN_ROWS:])):
            (folder / f"{name}.{split}.jsonl").write_text("".join(part), "utf-8")


def _solved(row: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": row["question"]},
        {"role": "assistant", "content": row["solution"]},
    ]


class Runs:
    """Every run of the tables: a stage, and where its outputs stand."""

    def __init__(self, source: Path, output: Path) -> None:
        self.source, self.output = source, output
        self.base = resolve_model(MODEL)
        self.stages = [
            Stage("rows", {"files": FILES, "rows": [TRAIN_ROWS, VALIDATION_ROWS]},
                  [source / f for f in FILES.values()], partial(prepare_rows, source)),
        ]  # fmt: skip

    def data(self, name: str) -> TuneData:
        """One data set, cut as every run takes it."""
        folder = self.output / "rows"
        files = ((str(folder / f"{name}.{split}.jsonl"),) for split in ("train", "validation"))
        return TuneData(*files, max_length=LENGTH)

    def add(
        self, name: str, config: Mapping[str, Any], inputs: Sequence[Path | str], run: Any
    ) -> None:
        """One more stage."""
        self.stages.append(Stage(name, config, ["rows", *inputs], run))

    def json(self, stage: str, file: str = "metrics.json") -> Any:
        """What a stage wrote; None where it has not run."""
        path = self.output / stage / file
        return json.loads(path.read_text("utf-8")) if path.is_file() else None

    # ---- ILA -----------------------------------------------------------------------------------

    def change(
        self, name: str, data: str, seed: int, kind: str, keep: Sequence[float] = ()
    ) -> None:
        """Stage 1: fine-tune and keep the change."""
        settings = LORA if kind == "lora" else FULL
        adapter = ADAPTER if kind == "lora" else None

        def run(folder: Path) -> None:
            milestones = KeepMilestones(keep or (1.0,), str(folder / "milestones"))
            train_variant(
                MODEL, self.data(data), Variant(name, adapter=adapter), settings,
                RunSettings(seed=seed), folder, [milestones] if keep else [], keep="change",
            )  # fmt: skip

        config = {"train": dataclasses.asdict(settings), "seed": seed, "kind": kind, "keep": keep}
        self.add(name, config, [], run)

    def scores(
        self,
        name: str,
        data: str,
        seed: int,
        stage: str,
        part: str = "change",
        s0: float = 4.0,
    ) -> None:
        """Stage 2: learn the gates of a change."""

        def run(folder: Path) -> None:
            machine = RunSettings(seed=seed)
            change = str(self.output / stage / part)
            module = ILAMaskLearning(
                MODEL,
                change,
                initial_score=s0,
                learning_rate=30.0,
                scores=str(folder / "scores.json"),
            )
            rows = data_module(self.data(data), MODEL, GATES, machine, folder)
            make_trainer(GATES, machine, folder).fit(module, datamodule=rows)

        config = {"train": dataclasses.asdict(GATES), "seed": seed, "part": part, "s0": s0}
        self.add(name, config, [stage], run)

    def ila(self) -> None:
        """Change and scores of every data set and seed; milestones, s_0 and full training."""
        for data in FILES:
            for seed in SEEDS:
                first = data == "dolly" and seed == 0
                change = f"change_{data}_{seed}"
                self.change(change, data, seed, "lora", MILESTONES[:-1] if first else ())
                self.scores(f"scores_{data}_{seed}", data, seed, change)
        for share in MILESTONES[:-1]:
            part = f"milestones/{milestone_name(share)}"
            self.scores(f"scores_at_{round(100 * share):03}", "dolly", 0, "change_dolly_0", part)
        for initial in INITIAL_SCORES[1:]:
            name = f"scores_from_{initial:g}".replace(".", "_")
            self.scores(name, "dolly", 0, "change_dolly_0", s0=initial)
        for data in FILES:
            self.change(f"change_full_{data}", data, 0, "full")
            self.scores(f"scores_full_{data}", data, 0, f"change_full_{data}")

    def tune(self) -> None:
        """Validation loss of training all layers, or only those that a ranking chooses."""
        self.add("tune_base", {}, [self.base], lambda folder: validation_loss(
            MODEL, self.data("dolly"), FULL, RunSettings(), folder))  # fmt: skip
        for group in ("tune", "lora"):
            for seed in SEEDS:
                for name in TUNED:
                    read = [] if name == "all layers" else [f"scores_dolly_{seed}"]
                    self.tuned(group, name, seed, "dolly", read, partial(self.layers, name, seed))

    def tuned(
        self, group: str, name: str, seed: int, data: str, inputs: Sequence[str], mask: Any
    ) -> None:
        """One variant, restricted to the mask that `mask()` gives when its time has come."""
        adapter, train = (ADAPTER, LORA) if group == "lora" else (None, FULL)

        def run(folder: Path) -> None:
            variant = Variant(name, mask(), adapter)
            train_variant(MODEL, self.data(data), variant, train, RunSettings(seed=seed), folder)

        config = {"train": dataclasses.asdict(train), "seed": seed, "variant": name}
        self.add(stage_name(group, name, seed), config, inputs, run)

    def layers(self, name: str, seed: int) -> ParameterMask | None:
        """The mask of a row of the ILA table."""
        if name == "all layers":
            return None
        order, share = name.split()[0], float(name.split()[-2]) / 100
        scores = self.layer_scores(f"scores_dolly_{seed}")
        names = list(scores.layers)
        if order != "top":
            ranks = {"first": range(len(names), 0, -1), "last": range(len(names))}.get(order)
            values = random_ranks(len(names), f"{name} {seed}") if ranks is None else list(ranks)
            layers = dict(zip(names, map(float, values), strict=True))
            scores = dataclasses.replace(scores, layers=layers)
        return layer_gate_mask(scores, parameter_shapes(self.base), share)

    def layer_scores(self, stage: str) -> LayerScores:
        """The scores that a stage learned."""
        return read_scores(self.output / stage / "scores.json")

    # ---- ALPS ----------------------------------------------------------------------------------

    def alps(self) -> None:
        """The task model, its heads, and training with these or others."""

        def task(folder: Path) -> None:
            variant = Variant("task model")
            train_variant(
                MODEL, self.data(TASK), variant, FULL, RunSettings(seed=0), folder, keep="model"
            )

        self.add("alps_task", {"train": dataclasses.asdict(FULL)}, [self.base], task)
        self.add("alps_heads", {"ratio": HEADS}, ["alps_task"], self.find_heads)
        self.add("alps_base", {}, [self.base], lambda folder: validation_loss(
            MODEL, self.data(TASK), FULL, RunSettings(), folder))  # fmt: skip
        for seed in SEEDS:
            for name in HEAD_SETS:
                read = ["alps_heads"] if name.startswith("ALPS") else []
                mask = partial(self.heads, name, seed)
                self.tuned("alps", name, seed, TASK, read, mask)

    def find_heads(self, folder: Path) -> None:
        """The heads that moved furthest, by both representations."""
        for representation in get_args(Representation):
            task = self.output / "alps_task" / "model"
            mask = head_distance_mask(self.base, task, HEADS, representation)
            mask.save(folder / f"{representation}.safetensors")

    def heads(self, name: str, seed: int) -> ParameterMask | None:
        """The mask of a row of the ALPS table; everything outside attention trains in each."""
        if name == "all attention":
            return None
        if name.startswith("ALPS"):
            file = f"{name.split()[-1]}.safetensors"
            return ParameterMask.load(self.output / "alps_heads" / file)
        model = meta_model(self.base)
        layout = HeadLayout.from_model(model)
        count = count_of_heads(HEADS, layout.total_heads)
        draw = {"random heads": random_heads, "layer-consistent heads": layer_consistent_heads}
        chosen = draw[name](layout, count, seed) if name in draw else {}
        return head_set_mask(layout, chosen, model)


TUNED = (
    "all layers", "top 75 %", "top 30 %", "top 10 %", "random 30 %",
    "first 30 %", "last 30 %",
)  # fmt: skip
TASK, HEADS = "dolly", 0.1
HEAD_SETS = (
    "all attention", "ALPS projection", "random heads", "layer-consistent heads",
    "no attention",
)  # fmt: skip


def random_ranks(count: int, seed: str) -> list[int]:
    """A permutation that the seed alone decides."""
    return random.Random(seed).sample(range(count), count)


def stage_name(group: str, name: str, seed: int) -> str:
    """A stage's name from a row's."""
    words = "".join(c if c.isalnum() else " " for c in name).split()
    return "_".join([group, *words, str(seed)])


# ---- tables ------------------------------------------------------------------------------------


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def top_layers(runs: Runs, stage: str, share: float = KEPT) -> set[str] | None:
    """The layers that a ranking keeps; None where it was not learned yet."""
    path = runs.output / stage / "scores.json"
    if not path.is_file():
        return None
    ranking = read_scores(path).ranking()
    return set(ranking[: math.ceil(share * len(ranking))])


def jaccard_table(runs: Runs, stages: Mapping[str, str]) -> str:
    """Jaccard similarities of the top layers of some rankings, and a random ranking's."""
    sets = {label: top_layers(runs, stage) for label, stage in stages.items()}
    sets = {label: found for label, found in sets.items() if found}
    rows = [
        [a, *("" if i <= j else f"{jaccard(sets[a], sets[b]):.2f}" for j, b in enumerate(sets))]
        for i, a in enumerate(sets)
    ]
    return markdown(["", *sets], rows)


def jaccard(a: set[str], b: set[str]) -> float:
    """|a ∩ b| / |a ∪ b|."""
    return len(a & b) / len(a | b)


def random_jaccard(total: int, kept: int) -> float:
    """What two random rankings give on average, by 2,000 draws."""
    draws = [set(random_ranks(total, str(i))[:kept]) for i in range(4000)]
    pairs = zip(draws[::2], draws[1::2], strict=True)
    return sum(jaccard({*map(str, a)}, {*map(str, b)}) for a, b in pairs) / 2000


def loss_table(runs: Runs, group: str, names: Sequence[str]) -> str:
    """Validation loss of each variant: mean, every seed, and the difference from the first row."""
    rows: list[list[Any]] = []
    base = runs.json("tune_base" if group == "lora" else f"{group}_base")
    if base:
        rows.append(["base", f"{base['validation_loss']:.4f}", "", "", "", ""])
    first: dict[int, float] = {}
    for name in names:
        found = {seed: runs.json(stage_name(group, name, seed)) for seed in SEEDS}
        found = {seed: metrics for seed, metrics in found.items() if metrics}
        if not found:
            continue
        losses = {seed: m["validation_loss"] for seed, m in found.items()}
        first = first or losses
        gaps = [losses[seed] - first[seed] for seed in losses if seed in first]
        rows.append([
            name,
            f"{sum(losses.values()) / len(losses):.4f}",
            ", ".join(f"{loss:.4f}" for loss in losses.values()),
            ", ".join(f"{gap:+.4f}" for gap in gaps),
            f"{next(iter(found.values()))['trained_parameters'] / 1e6:.1f} M",
            f"{sum(m['seconds'] for m in found.values()) / len(found):.0f}",
        ])  # fmt: skip
    head = ("trained", "mean", "by seed", f"against {names[0]}", "parameters", "seconds")
    return markdown(head, rows)


def tables(runs: Runs) -> str:
    """All tables, of what there is."""
    ranking = read_scores(next(runs.output.glob("scores_*/scores.json"))).layers
    kept = math.ceil(KEPT * len(ranking))
    by_data = {f"{d} {s}": f"scores_{d}_{s}" for d in FILES for s in SEEDS}
    milestones = {f"{m:.0%}": f"scores_at_{round(100 * m):03}" for m in MILESTONES[:-1]}
    initial = {f"s0 = {v:g}": f"scores_from_{v:g}".replace(".", "_") for v in INITIAL_SCORES[1:]}
    kinds = {f"full {d}": f"scores_full_{d}" for d in FILES}
    lora = {f"LoRA {d}": f"scores_{d}_0" for d in FILES}
    parts = [
        f"Two random rankings of {len(ranking)} layers: {random_jaccard(len(ranking), kept):.2f}.",
        "Data sets and seeds", jaccard_table(runs, by_data),
        "Milestones of stage 1", jaccard_table(runs, milestones | {"100%": "scores_dolly_0"}),
        "Initial scores", jaccard_table(runs, {"s0 = 4": "scores_dolly_0"} | initial),
        "LoRA against full", jaccard_table(runs, lora | kinds),
        "Validation loss, ILA, weights", loss_table(runs, "tune", TUNED),
        "Validation loss, ILA, LoRA", loss_table(runs, "lora", TUNED),
        "Validation loss, ALPS", loss_table(runs, "alps", HEAD_SETS),
    ]  # fmt: skip
    return "\n\n".join(parts)


def wanted(stages: Sequence[Stage], prefixes: Sequence[str]) -> list[Stage]:
    """The stages whose names begin so, and all that they read."""
    by_name = {stage.name: stage for stage in stages}
    chosen: set[str] = set()
    left = [s.name for s in stages if s.name.startswith(tuple(prefixes))]
    while left:
        name = left.pop()
        chosen.add(name)
        left += [i for i in by_name[name].inputs if isinstance(i, str) and i not in chosen]
    return [stage for stage in stages if stage.name in chosen]


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--output", type=Path, default=Path("runs/localization"))
    parser.add_argument("--only", nargs="*", default=[""], help="beginnings of stages' names")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    given = parser.parse_args()
    runs = Runs(given.data, given.output)
    runs.ila()
    runs.tune()
    runs.alps()
    if given.tables and not any(given.output.glob("scores_*/scores.json")):
        parser.error(f"{given.output} holds no scores yet: run without --tables")
    if not given.tables:
        run_stages(wanted(runs.stages, given.only), given.output)
    print(tables(runs))


if __name__ == "__main__":
    main()
