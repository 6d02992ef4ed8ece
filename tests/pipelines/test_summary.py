"""What a run comes to: the table, its note, and where a stage has no number."""

import torch

from lit_align.masks import select
from lit_align.pipelines.allo.summary import results_table
from lit_align.report import format_table


def result(accuracy: float, low: float, high: float, **more) -> dict:
    return {
        "accuracy": accuracy, "low": low, "high": high, "n": 100, "trained_parameters": 0,
        "peak_rss_mib": None, "train_seconds": None,
    } | more  # fmt: skip


def table(dpo: tuple[float, float, float], best: tuple[float, float, float]) -> str:
    mask = select({"w": torch.arange(100.0)}, 0.1)
    results = {
        "base": result(0.08, 0.04, 0.15),
        "dpo": result(*dpo, trained_parameters=100, peak_rss_mib=3000.4, train_seconds=61.2),
        "allo": result(*best, trained_parameters=10, peak_rss_mib=1500.0, train_seconds=12.0),
    }
    return format_table(results_table(results, mask))


def test_the_table_has_intervals_memory_and_seconds():
    said = table((0.3, 0.22, 0.4), (0.35, 0.26, 0.45))
    assert "8.0 % [4.0, 15.0]" in said and "3,000" in said and " 61" in said
    base = next(line for line in said.splitlines() if line.startswith("base"))
    assert base.split()[-2:] == ["–", "–"]


def test_overlapping_intervals_do_not_rank():
    assert "cannot rank" in table((0.3, 0.22, 0.4), (0.35, 0.26, 0.45)).replace("\n", " ")
    said = table((0.1, 0.05, 0.2), (0.4, 0.3, 0.5)).replace("\n", " ")
    assert "do not overlap" in said and "10.0%" in said
