"""What was found so far, on disk after every measurement."""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

from lit_align.files import write_atomically
from lit_align.pipelines.training_bench.job import Result
from lit_align.pipelines.training_bench.methods import METHODS
from lit_align.pipelines.training_bench.plan import Plan, versions
from lit_align.pipelines.training_bench.proofs import Proof

JSON_FILE = "training.json"
BASELINES = ("trl", "torch")  # what the others are compared with: the first that was measured
BYTES_PER_MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Summary:
    """One method, medians over its runs.

    Attributes:
        method: its name.
        pairs_per_s: over the timed steps.
        tokens_per_s: real tokens, prompt + chosen and prompt + rejected of each pair: the same
            count for every method.
        step_s: median of all timed steps.
        pairs_per_s_with_reference: with a reference that is computed once before training counted
            as one epoch's; equal to `pairs_per_s` where steps compute it.
        reference_s: seconds a pair of that pass; None: steps compute it.
        peak_mib: see `Result`.
        peak_above_imports_mib: without what the imports alone need.
        optimizer_mib: tensors of the optimiser's state, and its dense mask if it has one.
        checkpoint_mib: of files really written.
        trained_parameters: entries that train.
        losses: of every step of the first run.
        runs: how many.
    """

    method: str
    pairs_per_s: float
    tokens_per_s: float
    step_s: float
    pairs_per_s_with_reference: float
    reference_s: float | None
    peak_mib: float
    peak_above_imports_mib: float
    optimizer_mib: float
    checkpoint_mib: float | None
    trained_parameters: int
    losses: list[float]
    runs: int


@dataclasses.dataclass
class Record:
    """Proof, measurements and what they come to."""

    plan: Plan
    pair_tokens: list[int]
    proof: Proof | None = None
    measurements: list[tuple[int, Result]] = dataclasses.field(default_factory=list)

    def add(self, round_number: int, result: Result) -> None:
        """Take a measurement, and write everything anew."""
        self.measurements.append((round_number, result))
        self.write()

    def write(self) -> None:
        """Write `training.json`."""
        settings = self.plan.settings
        document: dict[str, Any] = {
            "device": device_name(settings.device),
            "versions": versions(),
            "settings": dataclasses.asdict(settings),
            "pair_tokens": self.pair_tokens,
            "proof": self.proof and dataclasses.asdict(self.proof) | {"holds": self.proof.holds},
            "left_out": self.plan.left_out,
            "summaries": [dataclasses.asdict(s) for s in self.summaries()],
            "measurements": [{"round": r} | dataclasses.asdict(m) for r, m in self.measurements],
        }
        text = json.dumps(document, indent=1) + "\n"
        write_atomically(self.plan.output / JSON_FILE, text.encode())

    @property
    def timed_tokens(self) -> list[int]:
        """Real tokens of each pair of the timed steps."""
        settings = self.plan.settings
        first = settings.warmup_steps * settings.pairs_per_step
        return self.pair_tokens[first : first + settings.steps * settings.pairs_per_step]

    def summaries(self) -> list[Summary]:
        """Of the methods measured so far, in the order of `METHODS`."""
        found = {result.method for _, result in self.measurements}
        return [self._summary(name) for name in METHODS if name in found]

    def line(self, method: str) -> str:
        """What a method's runs come to so far, for the terminal."""
        found = self._summary(method)
        return (
            f"{METHODS[method].label}: {found.pairs_per_s:.3g} pairs/s, {found.step_s:.3g} s a "
            f"step, peak {found.peak_mib:,.0f} MiB"
        )

    def baseline(self) -> Summary | None:
        """TRL's DPOTrainer, or the plain loop."""
        found = {s.method: s for s in self.summaries()}
        return next((found[name] for name in BASELINES if name in found), None)

    def _summary(self, name: str) -> Summary:
        results = [result for _, result in self.measurements if result.method == name]
        settings = self.plan.settings
        skipped, size = settings.warmup_steps, settings.pairs_per_step
        pairs = settings.steps * size
        tokens = sum(self.timed_tokens)
        seconds = [sum(r.step_seconds[skipped:]) for r in results]
        all_pairs = pairs + skipped * size
        reference = [
            None if r.reference_seconds is None else r.reference_seconds / all_pairs
            for r in results
        ]
        with_reference = [s + pairs * (r or 0.0) for s, r in zip(seconds, reference, strict=True)]
        known = [r for r in reference if r is not None]
        saved = [r.checkpoint_bytes for r in results if r.checkpoint_bytes is not None]
        median = statistics.median
        return Summary(
            method=name,
            pairs_per_s=median(pairs / s for s in seconds),
            tokens_per_s=median(tokens / s for s in seconds),
            step_s=median(step for r in results for step in r.step_seconds[skipped:]),
            pairs_per_s_with_reference=median(pairs / s for s in with_reference),
            reference_s=median(known) if known else None,
            peak_mib=median(r.peak_mib for r in results),
            peak_above_imports_mib=median(r.peak_mib - r.imports_mib for r in results),
            optimizer_mib=(results[0].optimizer_bytes + results[0].mask_bytes) / BYTES_PER_MIB,
            checkpoint_mib=saved[0] / BYTES_PER_MIB if saved else None,
            trained_parameters=results[0].trained_parameters,
            losses=results[0].losses,
            runs=len(results),
        )


def device_name(device: str) -> str:
    """For the record: the GPU, or the kind of CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = next(
        (line.partition(":")[2].strip() for line in _cpu_info() if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )
    return f"CPU {model}"


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
