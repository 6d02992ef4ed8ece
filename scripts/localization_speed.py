"""The 10 % of all weights that moved most, beside the obvious way: torch.topk of all joined.

    python scripts/localization_speed.py --rounds 5 --threads 2

On the shapes of SmolLM2-135M (134.5 M parameters) with random normal changes; every run in a fresh
process, in turns:

- concatenating: both models in memory; torch.cat of every |θ′ − θ|, torch.topk, a mask a parameter;
- in memory: `select` on the same two models;
- from safetensors: `select_by_weight_change` on two model folders, neither of them loaded.

Prints medians of the seconds, of the processor's seconds and of the peak memory above what was
there before (the two models in memory, or nothing), and each as a share of the first. All three
must find the same threshold.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from lit_align.localizers import ElementwiseScores, select_by_weight_change
from lit_align.localizers.stored import parameter_shapes
from lit_align.masks import select
from lit_align.peak_memory import PeakMemory

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
RATIO = 0.1
FIELDS = ("seconds", "cpu_seconds", "extra_mib")
Found = tuple[int, float]  # how many are selected, and the smallest change among them


def write_models(folder: Path) -> None:
    """`base` and `trained`: model folders, of which one is the other with normal changes."""
    generator = torch.Generator().manual_seed(0)
    config = LlamaConfig(**SMOLLM2)
    config.save_pretrained(folder / "base")
    config.save_pretrained(folder / "trained")
    base = {
        name: torch.randn(shape, generator=generator).mul_(0.05)
        for name, shape in parameter_shapes(folder / "base").items()
    }
    save_file(base, folder / "base" / "model.safetensors", {"format": "pt"})
    for values in base.values():
        values.add_(torch.randn(values.shape, generator=generator), alpha=1e-3)
    save_file(base, folder / "trained" / "model.safetensors", {"format": "pt"})


def concatenating(base: dict[str, Tensor], trained: dict[str, Tensor]) -> Found:
    """The obvious way; its masks are dense."""
    changes = torch.cat([(trained[name] - base[name]).abs().flatten() for name in base])
    top = torch.topk(changes, round(RATIO * changes.numel()))
    flags = torch.zeros(changes.numel(), dtype=torch.bool)
    flags[top.indices] = True
    parts = flags.split([values.numel() for values in base.values()])
    masks = {name: part.view(base[name].shape) for name, part in zip(base, parts, strict=True)}
    return sum(int(mask.sum()) for mask in masks.values()), float(top.values[-1])


def in_memory(base: dict[str, Tensor], trained: dict[str, Tensor]) -> Found:
    """Ours, on the same two models."""
    before = {name: values.view(-1) for name, values in base.items()}
    after = {name: values.view(-1) for name, values in trained.items()}

    def change(name: str, start: int, stop: int) -> Tensor:
        return (after[name][start:stop] - before[name][start:stop]).abs_()

    scores = ElementwiseScores({n: tuple(t.shape) for n, t in base.items()}, change)
    mask = select(scores, RATIO)
    return mask.count(), mask.metadata.extra["threshold"]


def from_safetensors(folder: Path) -> Found:
    """Ours, on two folders."""
    mask = select_by_weight_change(folder / "base", folder / "trained", RATIO)
    return mask.count(), mask.metadata.extra["threshold"]


def work(way: str, folder: Path) -> dict[str, Any]:
    """One run of one way, in this process."""
    if way == "from safetensors":
        parameter_shapes(folder / "base")  # imports the model's code
        return measured(lambda: from_safetensors(folder))
    models = [
        {n: t.clone() for n, t in load_file(folder / which / "model.safetensors").items()}
        for which in ("base", "trained")
    ]  # clones, because what is read from the file is only mapped
    find = concatenating if way == "concatenating" else in_memory
    return measured(lambda: find(*models))


def measured(find: Callable[[], Found]) -> dict[str, Any]:
    """Time and memory of a call, and what it found."""
    with PeakMemory() as peak:
        start, cpu_start = perf_counter(), process_time()
        count, threshold = find()
        seconds, cpu_seconds = perf_counter() - start, process_time() - cpu_start
    if peak.mib is None or peak.before_mib is None:
        raise SystemExit("this system does not tell the peak memory of a part of a process")
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "extra_mib": peak.mib - peak.before_mib,
        "found": [count, threshold],
    }


WAYS = ("concatenating", "in memory", "from safetensors")


def run(way: str, folder: Path, threads: int) -> dict[str, Any]:
    """One run of one way, in a process of its own."""
    command = [sys.executable, __file__, "--threads", str(threads), "--work", way, str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Medians, and in brackets their share of the first way's."""
    medians = {way: {f: median(r[f] for r in rs) for f in FIELDS} for way, rs in runs.items()}
    first = medians[WAYS[0]]
    lines = [f"{'':18}" + "".join(f"{field:>22}" for field in FIELDS)]
    for way, values in medians.items():
        cells = (f"{values[f]:.2f} ({values[f] / first[f]:.3f})" for f in FIELDS)
        lines.append(f"{way:18}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--work", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.work:
        print(json.dumps(work(arguments.work[0], Path(arguments.work[1]))))
        return
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        write_models(Path(scratch))
        for _ in range(arguments.rounds):
            for way in WAYS:
                runs[way].append(run(way, Path(scratch), arguments.threads))
    found = {tuple(each["found"]) for way in WAYS for each in runs[way]}
    if len(found) != 1:
        raise SystemExit(f"the ways differ in (entries selected, threshold): {found}")
    print(table(runs))
    if arguments.json:
        arguments.json.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
