"""One rank of a run under DDP with gloo; `test_distributed` starts one or two of these.

Writes what the run ended in, and how many bytes this process wrote to files and sockets meanwhile.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from lit_align.callbacks import KeyParameterLocalization, LogpsWriter
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
    "npo": (TokenWeightedNPO, {"retain": "nll"}, unlearning, unlearning_rows),
}
NUM_ROWS = 9  # in global batches of four: the last one leaves the second rank without a row


def written_bytes() -> int:
    """Bytes that this process has written, to sockets as well."""
    io = Path("/proc/self/io").read_text().split()
    return int(io[io.index("wchar:") + 1])


def main(objective: str, model: str, mask: str, world_size: int, out: Path) -> None:
    torch.set_num_threads(1)
    kind, settings, data, rows = OBJECTIVES[objective]
    given = (
        KeyParameterLocalization(mask=mask)
        if mask
        else KeyParameterLocalization("gradient", num_batches=3)
    )
    log = MemoryLogger()
    run = trainer(
        out, callbacks=[given, LogpsWriter()], logger=log, log_every_n_steps=1,
        devices=world_size, strategy="ddp" if world_size > 1 else "auto", max_epochs=2,
        gradient_clip_val=1.0,
    )  # fmt: skip
    module = kind(model, learning_rate=1e-2, eps=1e-3, warmup_ratio=0.0, **settings)
    splits = {"validation": rows(5, seed=3), "predict": rows(5, seed=4)}
    rows_of = data(NUM_ROWS, batch_size=4 // world_size, splits=splits)
    before = written_bytes()
    run.fit(module, rows_of)
    figures = {
        "steps": run.global_step,
        "written_bytes": written_bytes() - before,
        "selected": module.mask.count(),
        "mask": module.mask.digest,
    }
    if run.global_rank == 0:  # each later logged value is the same on every rank
        figures |= {n: log.values(n) for n in ("loss", "grad_norm", "eval_loss", "num_tokens")}
    save_file(weights(module), out / f"weights-{run.global_rank}.safetensors")
    (out / f"figures-{run.global_rank}.json").write_text(json.dumps(figures))
    run.predict(module, rows_of)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), Path(sys.argv[5]))
