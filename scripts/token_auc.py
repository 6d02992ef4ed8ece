"""Token weights against human error spans, for docs/RESULTS.md: some seeds, resumable.

    python scripts/token_auc.py --data ../shared/data/qa_feedback_spans.jsonl --minutes 10

For each seed the untrained model is asked first (no training), then a reward model that was trained
on part of the rows; both measure the same other rows. Run it again and it goes on where it stopped.
A new measurement is begun only inside the time given.
"""

import argparse
import json
import time
from pathlib import Path

from lit_align.gguf_alias import ALIAS
from lit_align.pipelines.settings import RunSettings
from lit_align.pipelines.token_auc.pipeline import RewardTrainSettings, table, token_weight_auc
from lit_align.pipelines.token_auc.stages import TokenAucSettings


def main() -> None:
    """Measure what the time allows and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/token_auc"))
    parser.add_argument("--model", default=ALIAS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--train-rows", type=int, default=100)
    parser.add_argument("--identity-rows", type=int, default=20)
    parser.add_argument("--test-rows", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    given = parser.parse_args()
    begin, found = time.monotonic(), {}
    for seed in given.seeds:
        for trained in (False, True):
            if found and time.monotonic() - begin > 60 * given.minutes:
                print(f"the time is over: seed {seed} was not measured whole")
                break
            rows = TokenAucSettings(
                train_rows=given.train_rows,
                identity_rows=given.identity_rows,
                test_rows=given.test_rows,
                train=trained,
                seed=seed,
            )
            train = RewardTrainSettings(
                epochs=given.epochs, learning_rate=given.learning_rate, max_length=1024
            )
            name = f"seed-{seed}-{'trained' if trained else 'untrained'}"
            found[name] = token_weight_auc(
                given.data,
                str(given.output / name),
                given.model,
                rows=rows,
                train=train,
                run=RunSettings(seed=seed),
            )
    for name, results in found.items():
        print(f"\n{name}\n{table(results)}")
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "results.json").write_text(json.dumps(found, indent=1), "utf-8")


if __name__ == "__main__":
    main()
