"""Whatever the data, three processes lose no row, take none twice, and end together."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.modules.distributed_script import run_ranks

# Rows of the training split, and what is special about it. There are 5 for validation and 5 for
# predictions, in batches of one row a rank.
CASES = {
    "fewer_rows_than_ranks": {"num_rows": 2},
    "one_row": {"num_rows": 1},
    "token_budget": {"num_rows": 11, "data_settings": {"max_tokens": 40}},
    "grouped_token_budget": {
        "num_rows": 7,
        "data_settings": {"max_tokens": 30, "group_by_length": True},
    },
    "padded": {"num_rows": 4, "data_settings": {"layout": "padded"}},
}
STRATEGIES = ("ddp", "sharded")


@pytest.fixture(scope="module")
def on_three(tiny_llama_dir, tmp_path_factory) -> Path:
    """Folder of the runs; of each, the mask is made from gradients first."""
    folder = tmp_path_factory.mktemp("three")
    shared = {"objective": "dpo", "model": str(tiny_llama_dir), "mask": "", "batch": 3}
    runs = [
        shared | case | {"strategy": strategy, "out": str(folder / f"{name}-{strategy}")}
        for strategy in STRATEGIES
        for name, case in CASES.items()
    ]
    run_ranks(3, runs)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES)
def test_each_row_counts_once(case, strategy, on_three):
    folder, count = on_three / f"{case}-{strategy}", CASES[case]["num_rows"]
    ranks = [json.loads((folder / f"rows-{rank}.json").read_text()) for rank in range(3)]
    for name in ranks[0]:
        assert len({len(rank[name]) for rank in ranks}) == 1, name  # equally many batches
    for epoch in range(2):
        for split, rows in (("train", count), ("validation", 5)):
            assert visited(ranks, split, epoch, epochs=2) == dict.fromkeys(range(rows), 1)
    assert visited(ranks, "predict", 0, epochs=1) == dict.fromkeys(range(5), 1)
    assert set(visited(ranks, "localized", 0, epochs=1).values()) == {1}
    lines = [json.loads(line) for line in (folder / "logps.jsonl").read_text().splitlines()]
    assert [record["row_id"] for record in lines] == [i // 2 for i in range(10)]


def visited(ranks: list[dict], split: str, epoch: int, epochs: int) -> dict[int, int]:
    """How often each row came, on whatever rank; fillers do not count."""
    found = Counter()
    for rank in ranks:
        steps = len(rank[split]) // epochs
        for batch in rank[split][epoch * steps : (epoch + 1) * steps]:
            found.update(row for row in batch if row >= 0)
    return dict(sorted(found.items()))
