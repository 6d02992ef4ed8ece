"""Fits in forks of one process, killed at chosen or random moments and started again.

Usage: python -m tests.kill_script MODEL [RUN, ...] (JSON). A run: {"out": folder, "kill": when,
"port": of the rendezvous of two ranks, left out for one, "strategy": theirs, ddp or sharded,
"damage": how a file's name ends that is changed in the newest checkpoint before}. When: "" never;
"KIND:N" at the Nth such moment ("sigterm:N": SIGTERM to the last rank alone); "after:N:SECONDS"
so long after the Nth batch began.
Prints how each run ended, and when its training began and ended; a run that came to its end leaves
`final.safetensors`.
"""

import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import save_file

import lit_align.checkpoint_file
from lit_align.callbacks import Checkpointing, KeyParameterLocalization
from lit_align.modules import MaskedDPO, sharded_saving
from lit_align.shards import whole
from tests.training_runs import preference_rows, preferences, trainer

ACCUMULATE = 2


class Killer(Callback):
    """Kills the process at the Nth moment of a kind, or some time after it."""

    def __init__(self, when: str) -> None:
        self.kind, number, seconds = (*when.split(":"), "0", "0")[:3]
        self.left, self.seconds = int(number), float(seconds)

    def moment(self, kind: str, before: Callable[[], Any] | None = None) -> None:
        if kind == self.kind:
            self.left -= 1
            if self.left == 0:
                if before is not None:
                    before()
                os.kill(os.getpid(), signal.SIGKILL)

    def on_train_start(self, trainer, pl_module):
        print(f"began {time.time()}", flush=True)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.moment("window" if batch_idx % ACCUMULATE else "step")
        if self.kind == "after":
            self.left -= 1
            if self.left == 0:
                threading.Timer(self.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        if self.kind == "sigterm":
            self.left -= 1
            if self.left == 0 and trainer.global_rank == trainer.world_size - 1:
                os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_batch_start(self, trainer, *_):
        if not trainer.sanity_checking:
            self.moment("validation")


def half_written(killer: Killer) -> None:
    """Make the Nth write of a checkpoint a moment: half of it is in the file."""
    save = torch.save

    def save_in_two(checkpoint, handle):
        save(checkpoint, handle)
        killer.moment("write", lambda: handle.truncate(handle.tell() // 2))

    lit_align.checkpoint_file.torch.save = save_in_two


def half_published(killer: Killer) -> None:
    """The moment when shards are written, and their folder does not have its name yet."""
    write_checksums = sharded_saving.write_checksums

    def write(*args):
        killer.moment("write")
        write_checksums(*args)

    sharded_saving.write_checksums = write


def damage_newest(folder: Path, ending: str) -> None:
    """Change one byte of a file of the newest sharded checkpoint."""
    newest = max(folder.glob("checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    path = next(path for path in newest.iterdir() if path.name.endswith(ending))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def fit(model: str, out: Path, when: str, ranks: int, strategy: str) -> None:
    """Two epochs of five batches a rank, validated on the way; the last window is a short one."""
    killer = Killer(when)
    if killer.kind == "write":
        (half_published if strategy == "sharded" else half_written)(killer)
    if strategy == "sharded":
        chosen: Any = ModelParallelStrategy(ranks, 1)
    else:
        chosen = strategy if ranks > 1 else "auto"
    run = trainer(
        out, enable_checkpointing=True, accumulate_grad_batches=ACCUMULATE, max_epochs=2,
        val_check_interval=2, devices=ranks, strategy=chosen,
        callbacks=[KeyParameterLocalization("random"), killer,
                   Checkpointing(every_n_train_steps=1, keep=2)],
    )  # fmt: skip
    module = MaskedDPO(model, learning_rate=1e-2, weight_decay=0.1)
    splits = {"validation": preference_rows(4, seed=3)}
    data = preferences(10, batch_size=2 // ranks, splits=splits)
    run.fit(module, data, ckpt_path="last")
    state = {name: whole(t).contiguous() for name, t in module.state_dict().items()}
    if run.is_global_zero:
        save_file(state, out / "final.safetensors")
        print(f"ended {time.time()}", flush=True)


def run_forked(
    model: str,
    out: str,
    kill: str = "",
    port: int | None = None,
    strategy: str = "ddp",
    damage: str = "",
) -> None:
    """Fork, so that what is slow to import is imported once, and wait for the end."""
    child = os.fork()
    if child == 0:
        try:
            if port is not None:
                os.environ["MASTER_PORT"] = str(port)
            if damage and os.environ.get("LOCAL_RANK", "0") == "0":
                damage_newest(Path(out), damage)
            fit(model, Path(out), kill, 1 if port is None else 2, strategy)
            os._exit(0)
        except SystemExit as end:
            os._exit(end.code)
        except BaseException:  # whatever it was: what follows is the parent's
            traceback.print_exc()
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("killed" if status == -signal.SIGKILL else f"status {status}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()
    for each in json.loads(sys.argv[2]):
        run_forked(sys.argv[1], **each)
