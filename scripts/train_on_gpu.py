"""DPO runs on one GPU, one after the other in this process: speed, memory, checkpoints.

    python scripts/train_on_gpu.py --shape 1b --tokenizer FOLDER --pairs FILE --output out.json

The model has the shape of Llama 3.2 1B (or Llama 3.1 8B) and random weights: that is enough for
speed and memory, and says nothing of quality. Pairs are token ids as `lit-align bench training`
writes them (prompt_ids, chosen_ids, rejected_ids). Masks are random: 10 % of the rows or elements
of every matrix. Tokens are those of both sequences of a pair, prompt and response.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import shutil
import statistics
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from lit_align.masks import ParameterMask
from lit_align.masks.granularity import Selection
from lit_align.pipelines.training_bench import worker
from lit_align.pipelines.training_bench.job import Job
from lit_align.pipelines.training_bench.methods import METHODS
from lit_align.pipelines.training_bench.pairs import tokens_of_pairs
from lit_align.pipelines.training_bench.worker.watch import Watch

COMMON: dict[str, Any] = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16,
             "num_hidden_layers": 2, "num_attention_heads": 8, "tie_word_embeddings": True},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "head_dim": 64, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "tie_word_embeddings": False},
}  # fmt: skip
RUNS = {
    "1b": ["rows:bf16-true", "elements:bf16-true", "rows:bf16-mixed", "full:bf16-mixed",
           "trl:bf16-mixed"],
    "8b": ["rows-selective:bf16-true"],
    "tiny": ["rows:bf16-mixed", "full:bf16-mixed", "trl:bf16-mixed"],
}  # fmt: skip
RATIO = 0.1


def make_model(shape: str, tokenizer: str, folder: Path, device: str) -> None:
    """Random weights (in bf16 for 8b), the tokenizer, and both masks."""
    torch.manual_seed(0)
    config = LlamaConfig(**COMMON | SHAPES[shape], bos_token_id=1, eos_token_id=2)
    dtype = torch.bfloat16 if shape == "8b" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    del model
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    for kind, of in (("row", _rows), ("element", _elements)):
        if kind == "row" or shape != "8b":
            chosen = {name: Selection.none(shape) for name, shape in shapes.items()}
            chosen |= {name: of(shape, device) for name, shape in matrices.items()}
            ParameterMask(chosen).save(folder / f"{kind}.mask")


def _rows(shape: tuple[int, ...], device: str) -> Selection:
    rows = torch.randperm(shape[0])[: round(RATIO * shape[0])].sort().values
    return Selection.of_rows(shape, rows)


def _elements(shape: tuple[int, ...], device: str) -> Selection:
    return Selection.of_dense(torch.rand(shape, device=device) < RATIO)


def run(name: str, arguments: argparse.Namespace, model: Path, scratch: Path) -> dict[str, Any]:
    """One run of `method:precision`."""
    method, precision = name.split(":")
    found = METHODS[method]
    job = Job(
        method=method, model=str(model), pairs=arguments.pairs, steps=arguments.steps,
        pairs_per_step=arguments.pairs_per_step, max_length=arguments.max_length,
        learning_rate=5e-6, threads=torch.get_num_threads(), device=arguments.device,
        mask=None if found.mask is None else str(model / f"{found.mask}.mask"),
        saves=found.mask is not None and not arguments.no_checkpoint, precision=precision,
        checkpointing=found.checkpointing,
    )  # fmt: skip
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    runner = importlib.import_module(f"{worker.__name__}.{found.runner}")
    gc.collect()
    if arguments.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    result = runner.run(job, scratch, Watch(job))
    tokens = tokens_of_pairs(Path(arguments.pairs))
    per_step = [
        sum(tokens[i : i + job.pairs_per_step]) for i in range(0, job.num_pairs, job.pairs_per_step)
    ]
    timed = range(arguments.warmup_steps, job.steps)
    seconds = sum(result.step_seconds[i] for i in timed)
    return {
        "run": name,
        "tokens_per_s": sum(per_step[i] for i in timed) / seconds,
        "median_step_s": statistics.median(result.step_seconds[i] for i in timed),
        "step_seconds": result.step_seconds,
        "step_tokens": per_step,
        "peak_mib": result.peak_mib,
        "optimizer_mib": result.optimizer_bytes / 2**20,
        "checkpoint_mib": None if result.checkpoint_bytes is None
        else result.checkpoint_bytes / 2**20,
        "trained": result.trained_parameters,
        "reference_s": result.reference_seconds,
        "losses": result.losses,
        "details": result.details,
    }  # fmt: skip


def main() -> None:
    """Make the model, go through the runs in turns, write what was found after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--folder", default="/tmp/train_on_gpu")
    parser.add_argument("--runs", nargs="+", help="method:precision, as `bench training` has them")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup-steps", type=int, default=3)
    parser.add_argument("--pairs-per-step", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--no-checkpoint", action="store_true")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    model = Path(arguments.folder) / arguments.shape
    make_model(arguments.shape, arguments.tokenizer, model, arguments.device)
    gc.collect()
    found = []
    for number in range(arguments.rounds):
        for name in arguments.runs or RUNS[arguments.shape]:
            try:
                one = run(name, arguments, model, model / "scratch")
            except Exception:  # the other runs are worth having
                traceback.print_exc()
                continue
            found.append({"round": number} | one)
            print({key: value for key, value in one.items() if key[:5] not in ("step_", "losse")})
            sys.stdout.flush()
            Path(arguments.output).write_text(json.dumps(found, indent=1))
    shutil.rmtree(model)


if __name__ == "__main__":
    main()
