"""`python -m lit_align.pipelines.training_bench.worker FOLDER`: do the job in `FOLDER/job.json`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch

from lit_align.pipelines.training_bench import worker
from lit_align.pipelines.training_bench.job import JOB_FILE, SCRATCH, Job, Result
from lit_align.pipelines.training_bench.methods import METHODS, WARM_UP
from lit_align.pipelines.training_bench.worker.watch import Watch


def work(folder: Path) -> Result:
    """Do the job of a folder and write its result there."""
    job = Job.read(folder / JOB_FILE)
    torch.set_num_threads(job.threads)
    method = WARM_UP if job.method == WARM_UP.name else METHODS[job.method]
    runner = importlib.import_module(f"{worker.__name__}.{method.runner}")
    scratch = folder / SCRATCH
    scratch.mkdir()
    result: Result = runner.run(job, scratch, Watch(job))
    result.write(folder)
    return result


if __name__ == "__main__":
    work(Path(sys.argv[1]))
