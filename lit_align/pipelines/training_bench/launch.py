"""A worker in a fresh process, with its threads pinned."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from lit_align.errors import BenchmarkError
from lit_align.pipelines.training_bench.job import SCRATCH, Job
from lit_align.pipelines.training_bench.methods import INSTALL

WORKER = "lit_align.pipelines.training_bench.worker"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
LAST_LINES = 12


def launch(job: Job, folder: Path) -> None:
    """Do a job in a process of its own; its result is then in `folder`.

    Raises:
        BenchmarkError: the worker failed; holds the end of what it said.
    """
    job.write(folder)
    log = folder / "logs" / "worker.txt"
    log.parent.mkdir()
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(job.threads))
    environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        done = subprocess.run(
            [sys.executable, "-m", WORKER, str(folder)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            check=False,
        )
    if done.returncode != 0:
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        raise BenchmarkError(
            f"{job.method} failed with exit code {done.returncode} ({log}; what others need: "
            f"{INSTALL}):\n" + "\n".join(said)
        )
    shutil.rmtree(folder / SCRATCH)
