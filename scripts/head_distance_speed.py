"""Scoring every attention head, beside the obvious way: scipy's Wasserstein distance, head by head.

    pip install scipy
    python scripts/head_distance_speed.py --model smollm2-135m-instruct-q4 --rounds 5

Both read the same two folders, in the same process, in turns: `head_distance_scores`, and
`scipy.stats.wasserstein_distance` on the indices of a head's entries (which sorts both). The task
model is the base with a little noise, in a temporary folder, unless --task names one. Prints the
medians in milliseconds, their ratio, and how far the scores differ.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.stats import wasserstein_distance

from lit_align.language_model import (
    load_language_model,
    resolve_model,
    save_language_model,
    weight_files,
)
from lit_align.localizers import head_distance_scores
from lit_align.localizers.stored import meta_model
from lit_align.masks import HeadLayout

ALLOWED = {"qkv": 1 / 20, "projection": None}  # nothing is asked of the latter: it is matmuls
NOISE = 1e-4


def noisy_copy(base_dir: Path, folder: Path) -> Path:
    """The base with noise of a fine-tuning's size in every weight."""
    model, tokenizer = load_language_model(base_dir)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=NOISE)
    return save_language_model(model, tokenizer, folder)


def scipy_scores(base_dir: Path, task_dir: Path, representation: str) -> list[float]:
    """The obvious way."""
    layout = HeadLayout.from_model(meta_model(base_dir))
    heads = zip(
        *(_distributions(folder, layout, representation) for folder in (base_dir, task_dir)),
        strict=True,
    )
    scores = []
    for p, q in heads:
        index = np.arange(len(p))
        scores.append(float(wasserstein_distance(index, index, p, q)))
    return scores


def _distributions(folder: Path, layout: HeadLayout, representation: str) -> Iterator[np.ndarray]:
    weights: dict[str, Any] = {}
    for file in weight_files(folder):
        weights |= load_file(file)
    for block in layout.blocks:
        for head in range(layout.num_heads):
            group = head // layout.heads_per_group
            parts = []
            for projection, unit in zip(block, (head, group, group), strict=True):
                weight = weights[projection.name]
                start = projection.starts[unit]
                rows = weight.narrow(projection.axis, start, layout.head_dim)
                parts.append((rows if projection.axis == 0 else rows.T).double())
            q, k, v = parts
            entries = torch.cat(parts) if representation == "qkv" else q.T @ (k @ v.T)
            yield entries.flatten().softmax(0).numpy()


def measure(base_dir: Path, task_dir: Path, representation: Any, rounds: int) -> dict[str, Any]:
    """Medians of both ways, in turns."""
    ours, scipys = [], []
    head_distance_scores(base_dir, task_dir, representation)  # files and imports are warm for both
    for _ in range(rounds):
        start = perf_counter()
        scores = head_distance_scores(base_dir, task_dir, representation)
        ours.append(1e3 * (perf_counter() - start))
        start = perf_counter()
        expected = np.array(scipy_scores(base_dir, task_dir, representation))
        scipys.append(1e3 * (perf_counter() - start))
    found = torch.cat(list(scores.values())).numpy()
    ratio = median(ours) / median(scipys)
    return {
        "representation": representation,
        "heads": len(found),
        "lit_align_ms": round(median(ours), 1),
        "scipy_ms": round(median(scipys), 1),
        "ratio": round(ratio, 4),
        "allowed": ALLOWED[representation],
        "largest_difference_of_the_top_score": float(np.abs(found - expected).max() / found.max()),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Measure and print, one JSON object a representation."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct-q4")
    parser.add_argument("--task", help="folder of the task model; default: the base with noise")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base_dir = resolve_model(arguments.model)
    with tempfile.TemporaryDirectory() as scratch:
        task = arguments.task
        task_dir = resolve_model(task) if task else noisy_copy(base_dir, Path(scratch) / "task")
        for representation in ("qkv", "projection"):
            print(json.dumps(measure(base_dir, task_dir, representation, arguments.rounds)))


if __name__ == "__main__":
    main()
