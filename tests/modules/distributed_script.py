"""Ranks of some runs under DDP or FSDP2 with gloo: one where LOCAL_RANK is set, else all, forked.

Usage: python -m tests.modules.distributed_script [RUN, ...]
A run's folder gets what it ended in, and how many bytes this process wrote to sockets meanwhile.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_align.callbacks import KeyParameterLocalization, LogpsWriter
from lit_align.compact import AdapterSettings, links, trainable
from lit_align.modules import ILAMaskLearning, MaskedDPO, SupervisedFineTuning, TokenWeightedNPO
from lit_align.shards import local, whole
from lit_align_kernels.swap_selected import gather_entries
from tests.training_runs import (
    MemoryLogger,
    instructions,
    preference_rows,
    preferences,
    sft_rows,
    trainer,
    unlearning,
    unlearning_rows,
    weights,
)

OBJECTIVES = {
    "sft": (SupervisedFineTuning, {}, instructions, sft_rows),
    "dpo": (MaskedDPO, {}, preferences, preference_rows),
    "swap": (MaskedDPO, {"reference": "swap"}, preferences, preference_rows),
    "lora": (
        MaskedDPO,
        {"adapter": AdapterSettings(rank=4, dropout=0.0), "reference": "swap"},
        preferences,
        preference_rows,
    ),
    "adalora": (
        SupervisedFineTuning,
        {"adapter": AdapterSettings("adalora", rank=4, dropout=0.0)},
        instructions,
        sft_rows,
    ),
    "npo": (TokenWeightedNPO, {"retain": "nll"}, unlearning, unlearning_rows),
}


class WithTorchsAdamW(SupervisedFineTuning):
    """Another optimiser than MaskedAdamW: what it makes is written through by a hook."""

    def configure_optimizers(self):
        return torch.optim.AdamW([p for _, p in trainable(self.model)], lr=1e-2, eps=1e-3)


FURTHER = {
    "adamw": (WithTorchsAdamW, {}, instructions, sft_rows),
    "gates": (ILAMaskLearning, {"learning_rate": 100.0}, instructions, sft_rows),
}
# With gloo Lightning never takes inference mode, which would hide what a GPU would meet.
EVALUATION_AS_BY_NCCL = patch(
    "lightning.pytorch.loops.utilities.dist", SimpleNamespace(get_backend=lambda: "nccl")
)
NUM_ROWS = 9  # in global batches of four: the last one leaves the second rank without a row
ROOT = Path(__file__).resolve().parents[2]


class StartingValues(Callback):
    """Adapters of the same values in every run, however many numbers were drawn before."""

    def on_train_start(self, trainer, pl_module):
        g = torch.Generator().manual_seed(0)
        for _, parameter in trainable(pl_module.model):
            parameter.data.copy_(0.03 * torch.randn(parameter.shape, generator=g))


class SeenRows(Callback):
    """Which rows this rank was given; fillers are −1."""

    def __init__(self):
        self.rows = {"localized": [], "train": [], "validation": [], "predict": []}

    def setup(self, trainer, pl_module, stage):
        if stage == "fit":
            compute = pl_module.localization_loss

            def loss(batch):
                self._note("localized", batch)
                return compute(batch)

            pl_module.localization_loss = loss

    def _note(self, split, batch):
        self.rows[split].append(batch.row_ids.unique().tolist())

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._note("train", batch)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not trainer.sanity_checking:
            self._note("validation", batch)

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._note("predict", batch)


class Dies(Callback):
    """A rank ends after a step: killed, as by the kernel when memory is short, or by an error."""

    def __init__(self, how, rank):
        self.how, self.rank = how, rank

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step != 2 or trainer.global_rank != self.rank:
            return
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError("this rank's disk is gone")


class WrittenThrough(Callback):
    """After each step each rank's weights hold what is selected; what was restored, and when."""

    def __init__(self):
        self.at = {}

    def on_fit_start(self, trainer, pl_module):
        self.at["fit_start"] = entries_of(pl_module.model)

    def on_train_start(self, trainer, pl_module):
        self.at["train_start"] = entries_of(pl_module.model)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        entries_of(pl_module.model)


def entries_of(model) -> dict[str, torch.Tensor]:
    """What is selected, whole, after a look at whether the weights hold it."""
    selected = {name: whole(parameter).clone() for name, parameter in trainable(model)}
    for link in links(model):
        in_weight = gather_entries(whole(link.weight), link.state.entries)
        assert torch.equal(in_weight, whole(link.selected).reshape(-1).to(in_weight.dtype))
    return selected


class Collectives(TorchDispatchMode):
    """Bytes of the largest tensor of each collective operation, added up by the kind of it."""

    def __init__(self):
        super().__init__()
        self.num_bytes, self.largest = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # it makes up the operation of others, which come here
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            size = max((t.numel() * t.element_size() for t in tensors), default=0)
            kind = func._schema.name.split("::")[1]
            self.num_bytes[kind] += size
            self.largest[kind] = max(self.largest[kind], size)
        return func(*args, **(kwargs or {}))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def command_of(count: int, runs: list[dict]) -> tuple[list[str], dict[str, str]]:
    """What starts the runs on so many ranks, and its environment."""
    for each in runs:
        Path(each["out"]).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.modules.distributed_script", json.dumps(runs)]
    place = {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return command, os.environ | place | {"WORLD_SIZE": str(count)}


def start_ranks(count: int, runs: list[dict]) -> list[subprocess.Popen]:
    """Start one process for each rank; all of them go through all runs."""
    command, env = command_of(count, runs)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [
        subprocess.Popen(command, cwd=ROOT, env=env | {"LOCAL_RANK": str(rank)}, **streams)
        for rank in range(count)
    ]


def run_ranks(count: int, runs: list[dict]) -> None:
    """Run them all on so many forks of one process."""
    command, env = command_of(count, runs)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "sync_dist" not in done.stderr  # Lightning's warnings about what ranks log


def written_bytes() -> int:
    """Bytes that this process has written, to sockets as well."""
    io = Path("/proc/self/io").read_text().split()
    return int(io[io.index("wchar:") + 1])


def moments_here(trained: Trainer) -> int:
    """Entries of the optimiser's state that this process holds, steps left out."""
    state = trained.optimizers[0].state.values()
    return sum(local(value).numel() for each in state for value in each.values() if value.dim())


def strategy_of(kind: str, world_size: int):
    if kind == "sharded":
        return ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1)
    if kind == "one_file":
        return ModelParallelStrategy(world_size, 1, save_distributed_checkpoint=False)
    if kind == "default_mesh":
        return ModelParallelStrategy()
    return "ddp" if world_size > 1 else "auto"


def run(
    objective: str,
    model: str,
    mask: str,
    out: str,
    world_size: int,
    strategy: str = "ddp",
    verb: str = "fit",
    batch: int = 4,
    ckpt_path: str | None = None,
    keep: bool = False,
    dies: tuple[str, int] | None = None,
    counts: bool = False,
    granularity: str = "element",
    num_rows: int = NUM_ROWS,
    module_settings: dict | None = None,
    data_settings: dict | None = None,
    **trainer_settings,
) -> None:
    """Fit and predict; without a mask, one is made from gradient scores; adapters take none.

    Args:
        objective: of `OBJECTIVES` or `FURTHER`.
        model: folder.
        mask: file; "" for gradient scores, "weight_change" for a full fit that makes one, "whole"
            for none.
        out: folder of what comes out.
        world_size: number of ranks.
        strategy: ddp, sharded, one_file (sharded, its checkpoints not) or default_mesh; of one
            rank, `ddp` is none at all.
        verb: fit (and predict), validate or predict.
        batch: rows of a global batch.
        ckpt_path: to go on from.
        keep: write a checkpoint after every step.
        dies: how a rank ends on the way, and which.
        counts: the bytes of collective operations, by kind.
        granularity: of a mask by gradient scores.
        num_rows: of the training split.
        module_settings: further ones.
        data_settings: further ones.
        trainer_settings: further ones.
    """
    folder = Path(out)
    kind, settings, data, rows = (OBJECTIVES | FURTHER)[objective]
    settings = settings | (module_settings or {})
    if "adapter" in settings:
        given = StartingValues()
    elif mask == "whole":
        given = Callback()
    elif mask == "weight_change":
        given = KeyParameterLocalization("weight_change", output=str(folder / "mask.safetensors"))
    elif mask:
        given = KeyParameterLocalization(mask=mask)
    else:
        given = KeyParameterLocalization("gradient", num_batches=3, granularity=granularity)
    if (
        objective == "dpo" and "reference" not in settings
    ):  # of rows that come with `predict` as well
        settings = settings | {"reference_cache": str(folder / "cache")}
    log = MemoryLogger()
    seen = SeenRows()
    written = WrittenThrough()
    callbacks = [given, LogpsWriter(), seen] + ([Dies(*dies)] if dies else [])
    callbacks += [written] * (keep or ckpt_path is not None)
    if keep:
        callbacks.append(ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1))
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))  # torchrun says
    trained = trainer(
        folder, callbacks=callbacks, logger=log, log_every_n_steps=2, devices=devices,
        num_nodes=world_size // devices, strategy=strategy_of(strategy, world_size), max_epochs=2,
        enable_checkpointing=keep, **{"gradient_clip_val": 1.0} | trainer_settings,
    )  # fmt: skip
    module = kind(model, **{"learning_rate": 1e-2, "eps": 1e-3, "warmup_ratio": 0.0} | settings)
    splits = {"validation": rows(5, seed=3), "predict": rows(5, seed=4)}
    batch_size = max(batch // world_size, 1)
    rows_of = data(num_rows, batch_size=batch_size, splits=splits, **(data_settings or {}))
    before = written_bytes()
    if verb != "fit":
        found = getattr(trained, verb)(module, rows_of, ckpt_path=ckpt_path)
        if verb == "validate" and trained.global_rank == 0:
            (folder / "validate.json").write_text(json.dumps(found[0]))
        return
    with Collectives() if counts else nullcontext() as collectives:
        trained.fit(module, rows_of, ckpt_path=ckpt_path)
    figures = {
        "steps": trained.global_step,
        "written_bytes": written_bytes() - before,
        "selected": sum(p.numel() for _, p in trainable(module.model)),
        "mask": None if module.mask is None else module.mask.digest,
        "numel": sum(p.numel() for p in module.parameters()),
        "numel_here": sum(local(p).numel() for p in module.parameters()),
        "selected_here": sum(local(p).numel() for _, p in trainable(module.model)),
        "moments_here": moments_here(trained),
        "largest_selected": max(p.numel() for _, p in trainable(module.model)),
        "collectives": collectives.num_bytes if counts else None,
        "largest": collectives.largest if counts else None,
    }
    for name, selected in written.at.items():
        save_file(selected, folder / f"{name}-{trained.global_rank}.safetensors")
    if trained.global_rank == 0:  # each later logged value is the same on every rank
        figures |= {n: log.values(n) for n in ("loss", "grad_norm", "eval_loss", "num_tokens")}
    gathered = {name: whole(weight) for name, weight in weights(module).items()}
    save_file(gathered, folder / f"weights-{trained.global_rank}.safetensors")
    (folder / f"figures-{trained.global_rank}.json").write_text(json.dumps(figures))
    trained.predict(module, rows_of)
    (folder / f"rows-{trained.global_rank}.json").write_text(json.dumps(seen.rows))


def run_rank(runs: list[dict], world_size: int) -> None:
    for each in runs:
        with EVALUATION_AS_BY_NCCL if each.get("strategy") == "sharded" else nullcontext():
            run(**each, world_size=world_size)


def fork(rank: int, runs: list[dict], world_size: int) -> int:
    """Fork, so that what is slow to import is imported once; the child's id."""
    child = os.fork()
    if child == 0:
        os.environ["LOCAL_RANK"] = str(rank)
        try:
            run_rank(runs, world_size)
            os._exit(0)
        except BaseException:  # whatever it was: what follows is the parent's
            traceback.print_exc()
            os._exit(1)
    return child


def fork_ranks(runs: list[dict], world_size: int) -> None:
    children = [fork(rank, runs, world_size) for rank in range(world_size)]
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:
            for other in children:  # it would wait for this one
                os.kill(other, signal.SIGKILL)
            sys.exit(f"a rank ended with {status}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks = run_rank if "LOCAL_RANK" in os.environ else fork_ranks
    ranks(json.loads(sys.argv[1]), int(os.environ["WORLD_SIZE"]))  # Lightning removes it later
