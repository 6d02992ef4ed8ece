"""The QA table of docs/RESULTS.md: `configs/allo_qa.yaml` for some seeds, resumable.

    python scripts/qa_results.py --data ../shared/data --output runs/qa --minutes 60

Run it again and it goes on where it stopped. A new seed is begun only inside the time given.
"""

import argparse
import json
import time
from pathlib import Path

import yaml

from lit_align.cli import main as lit_align
from lit_align.evaluation import wilson_interval

CONFIG = Path(__file__).parents[1] / "configs" / "allo_qa.yaml"


def run_seed(seed: int, data: Path, output: Path, sizes: dict[str, int]) -> Path:
    """One run of the pipeline; the questions are the same for every seed."""
    folder = output / f"seed-{seed}"
    config = yaml.safe_load(CONFIG.read_text("utf-8"))
    config["data"] |= sizes
    files = config["data"]["train_files"]
    config["data"]["train_files"] = [f.replace("DATA", str(data.resolve())) for f in files]
    config["output"] = str(folder)
    config.setdefault("run", {})["seed"] = config["sample"]["seed"] = seed
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config), "utf-8")
    lit_align(["allo", "--config", str(folder / "config.yaml")])
    return folder / "results.json"


def table(results: list[dict]) -> str:
    """Markdown: accuracy over all seeds' answers with a 95 % interval, and each seed's."""
    sources = list(results[0]["base"]["by_source"])
    lines = [
        f"| model | all seeds | 95 % interval | each seed | {' | '.join(sources)} |",
        "|---" * (4 + len(sources)) + "|",
    ]
    for name in results[0]:
        rows = [r[name] for r in results]
        n = sum(r["n"] for r in rows)
        right = sum(round(r["accuracy"] * r["n"]) for r in rows)
        low, high = wilson_interval(right, n)
        seeds = ", ".join(f"{r['accuracy']:.1%}" for r in rows)
        by_source = []
        for source in sources:
            parts = [r["by_source"][source] for r in rows]
            share = sum(p["right"] for p in parts) / sum(p["n"] for p in parts)
            by_source.append(f"{share:.1%}")
        cells = [name, f"{right / n:.1%}", f"[{low:.1%}, {high:.1%}]", seeds, *by_source]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what the time allows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/qa"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--train-rows", type=int, help="fewer than the config's, for less time")
    parser.add_argument("--held-out-rows", type=int, help="likewise")
    arguments = parser.parse_args()
    given = {"train_rows": arguments.train_rows, "held_out_rows": arguments.held_out_rows}
    sizes = {name: rows for name, rows in given.items() if rows is not None}
    begin = time.monotonic()
    results = []
    for seed in arguments.seeds:
        if results and time.monotonic() - begin > 60 * arguments.minutes:
            print(f"the time is over: seed {seed} was not begun")
            break
        path = run_seed(seed, arguments.data, arguments.output, sizes)
        results.append(json.loads(path.read_text("utf-8")))
        print(table(results), flush=True)


if __name__ == "__main__":
    main()
