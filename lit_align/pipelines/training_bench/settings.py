"""Options of `lit-align bench training`."""

from __future__ import annotations

import argparse
import dataclasses
import os
from typing import Any

import torch

from lit_align.errors import BenchmarkError
from lit_align.gguf_alias import ALIAS
from lit_align.pipelines.training_bench.methods import METHODS

OUTPUT = "runs/bench_training"
# steps, warm-up steps, rounds, steps that are followed, steps of the run that the masks are from
SIZES = {"full": (4, 1, 2, 20, 8), "tiny": (1, 1, 1, 2, 2)}
COUNTS = ("steps", "warmup_steps", "rounds", "follow", "mask_steps")


@dataclasses.dataclass(frozen=True)
class BenchSettings:
    """What is measured, on what; see `parser` for each."""

    data: str
    model: str
    methods: tuple[str, ...]
    steps: int
    warmup_steps: int
    rounds: int
    follow: int
    mask_steps: int
    masks: str | None
    pairs_per_step: int
    max_length: int
    chat_template: str | None
    learning_rate: float
    threads: int
    device: str
    output: str

    def __post_init__(self) -> None:
        for name in (*COUNTS, "pairs_per_step", "threads"):
            least = 0 if name in ("warmup_steps", "follow") else 1
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise BenchmarkError(f"--{option} is {getattr(self, name)}; at least {least}")
        for name in self.methods:
            if name not in METHODS:
                raise BenchmarkError(f"no method {name!r}: choose from {', '.join(METHODS)}")

    @property
    def num_pairs(self) -> int:
        """Pairs that the longest run goes through."""
        longest = max(self.warmup_steps + self.steps, self.follow, self.mask_steps)
        return longest * self.pairs_per_step


def parser() -> argparse.ArgumentParser:
    """The command line of `bench training`."""
    found = argparse.ArgumentParser(
        prog="lit-align bench training",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="DPO by lit-align, TRL, peft and plain torch on the same pairs, side by side.\n"
        "lit-align is refused where its log-probs or losses are not those of the others.",
        epilog="methods: " + ", ".join(METHODS),
    )
    add = found.add_argument
    add("--data", required=True, help="file of preference pairs, in any format of lit-align")
    add("--model", default=ALIAS, help="folder, hub id or alias (%(default)s)")
    add("--methods", nargs="+", default=list(METHODS), metavar="METHOD", help="which; all of them")
    add("--size", choices=SIZES, default="full", help="tiny: a step of everything (%(default)s)")
    add("--steps", type=int, help="timed steps of a run (full: 4)")
    add("--warmup-steps", type=int, help="steps before them that are not counted (1)")
    add("--rounds", type=int, help="runs of every method, in turns (full: 2)")
    add("--follow", type=int, help="steps over which losses are compared; 0: none (full: 20)")
    add("--mask-steps", type=int, help="steps of the full run that the masks come from (full: 8)")
    add("--masks", help="folder of element, row, head and layer.safetensors, in place of that run")
    add("--pairs-per-step", type=int, default=2, help="(%(default)s)")
    add("--max-length", type=int, default=512, help="longer pairs are left out (%(default)s)")
    add("--chat-template", help="in place of the tokenizer's, as in `lit-align fit`")
    add("--learning-rate", type=float, default=5e-6, help="constant (%(default)s)")
    add("--threads", type=int, default=os.cpu_count(), help="of every run (%(default)s)")
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=cuda, help="(here: %(default)s)")
    add(
        "--output",
        default=OUTPUT,
        help="folder of results: run again to go on, name another when "
        "lit-align itself has changed (%(default)s)",
    )
    return found


def settings_of(options: dict[str, Any]) -> BenchSettings:
    """Settings from the parser's options: what is not given is the size's."""
    sizes = dict(zip(COUNTS, SIZES[options.pop("size")], strict=True))
    given = {name: value for name, value in options.items() if value is not None}
    missing = {"masks": None, "chat_template": None}
    methods = tuple(dict.fromkeys(options["methods"]))
    return BenchSettings(**missing | sizes | given | {"methods": methods})
