"""Runs ALLO in forks of one process, and kills some of them at random moments.

Usage: python allo_script.py MODEL FOLDER KILLS
The run in FOLDER/whole is left alone; the one in FOLDER/killed is killed KILLS times, then ends.
Prints after which stages each kill came.
"""

import gc
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from tests.pipelines.allo_settings import tiny_allo


def start(model: str, output: Path) -> int:
    """Fork, so that what is slow to import is imported once; the child's id."""
    child = os.fork()
    if child == 0:
        tiny_allo(model, output)
        sys.stdout.flush()
        os._exit(0)
    return child


def finish(child: int) -> None:
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit(f"a run that nobody killed ended with {status}")


def stages_done(output: Path) -> list[str]:
    manifest = output / "manifest.json"
    listed = json.loads(manifest.read_text("utf-8"))["stages"] if manifest.exists() else []
    return [record["name"] for record in listed]


def main(model: str, folder: Path, kills: int) -> None:
    gc.freeze()  # stages collect garbage: let them skip what was imported
    began = time.perf_counter()
    finish(start(model, folder / "whole"))
    seconds = time.perf_counter() - began
    for _ in range(kills):
        child = start(model, folder / "killed")
        time.sleep(random.uniform(0.3, 0.6) / kills * seconds)  # a busy machine may be free now
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if status != signal.SIGKILL:
            sys.exit("the run ended before it was killed")
        print("killed after", stages_done(folder / "killed"))
    finish(start(model, folder / "killed"))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
