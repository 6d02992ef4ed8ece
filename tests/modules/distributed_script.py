"""Two ranks of some runs under DDP with gloo, in forks of one process.

Usage: python -m tests.modules.distributed_script [RUN, ...]
A run's folder gets what it ended in, and how many bytes this process wrote to sockets meanwhile.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
from lightning.pytorch import Callback
from safetensors.torch import save_file

from lit_align.callbacks import KeyParameterLocalization, LogpsWriter
from lit_align.compact import AdapterSettings, trainable
from lit_align.modules import MaskedDPO, SupervisedFineTuning, TokenWeightedNPO
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
NUM_ROWS = 9  # in global batches of four: the last one leaves the second rank without a row


class StartingValues(Callback):
    """Adapters of the same values in every run, however many numbers were drawn before."""

    def on_train_start(self, trainer, pl_module):
        g = torch.Generator().manual_seed(0)
        for _, parameter in trainable(pl_module.model):
            parameter.data.copy_(0.03 * torch.randn(parameter.shape, generator=g))


def written_bytes() -> int:
    """Bytes that this process has written, to sockets as well."""
    io = Path("/proc/self/io").read_text().split()
    return int(io[io.index("wchar:") + 1])


def run(objective: str, model: str, mask: str, out: str, world_size: int) -> None:
    """Fit and predict; without a mask, one is made from gradient scores; adapters take none."""
    folder = Path(out)
    kind, settings, data, rows = OBJECTIVES[objective]
    if "adapter" in settings:
        given = StartingValues()
    elif mask:
        given = KeyParameterLocalization(mask=mask)
    else:
        given = KeyParameterLocalization("gradient", num_batches=3)
    if objective == "dpo":  # of rows that come with `predict` as well
        settings = settings | {"reference_cache": str(folder / "cache")}
    log = MemoryLogger()
    trained = trainer(
        folder, callbacks=[given, LogpsWriter()], logger=log, log_every_n_steps=2,
        devices=world_size, strategy="ddp" if world_size > 1 else "auto", max_epochs=2,
        gradient_clip_val=1.0,
    )  # fmt: skip
    module = kind(model, learning_rate=1e-2, eps=1e-3, warmup_ratio=0.0, **settings)
    splits = {"validation": rows(5, seed=3), "predict": rows(5, seed=4)}
    rows_of = data(NUM_ROWS, batch_size=4 // world_size, splits=splits)
    before = written_bytes()
    trained.fit(module, rows_of)
    figures = {
        "steps": trained.global_step,
        "written_bytes": written_bytes() - before,
        "selected": sum(p.numel() for _, p in trainable(module.model)),
        "mask": None if module.mask is None else module.mask.digest,
    }
    if trained.global_rank == 0:  # each later logged value is the same on every rank
        figures |= {n: log.values(n) for n in ("loss", "grad_norm", "eval_loss", "num_tokens")}
    save_file(weights(module), folder / f"weights-{trained.global_rank}.safetensors")
    (folder / f"figures-{trained.global_rank}.json").write_text(json.dumps(figures))
    trained.predict(module, rows_of)


def start(rank: int, runs: list[dict[str, str]]) -> int:
    """Fork, so that what is slow to import is imported once; the child's id."""
    child = os.fork()
    if child == 0:
        os.environ["LOCAL_RANK"] = str(rank)
        try:
            for each in runs:
                run(**each, world_size=2)
            os._exit(0)
        except BaseException:  # whatever it was: what follows is the parent's
            traceback.print_exc()
            os._exit(1)
    return child


def main(runs: list[dict[str, str]]) -> None:
    children = [start(rank, runs) for rank in range(2)]
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:
            for other in children:  # it would wait for this one
                os.kill(other, signal.SIGKILL)
            sys.exit(f"a rank ended with {status}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(sys.argv[1]))
