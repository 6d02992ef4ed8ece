"""Runs a small pipeline in forks of one process, which kill themselves at chosen moments.

Usage: python pipeline_script.py [[OUTPUT_DIR, SCALE, KILL_AT], ...]
KILL_AT counts the moments (before and after each rename, inside each stage); 0 never kills.
Prints a line for each run: `killed`, or how many moments there were.
"""

import gc
import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

from lit_align.pipelines.stage import Stage, run_stages

moments = kill_at = 0


def moment() -> None:
    global moments
    moments += 1
    if moments == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)


def surrounded(function):
    def call(*args, **kwargs):
        moment()
        result = function(*args, **kwargs)
        moment()
        return result

    return call


os.rename, os.replace = surrounded(os.rename), surrounded(os.replace)
shutil.rmtree = surrounded(shutil.rmtree)


def pipeline(output_dir: Path, scale: int) -> list[Stage]:
    def numbers(folder: Path) -> None:
        (folder / "numbers.txt").write_text(f"{scale}\n")
        moment()
        (folder / "deep").mkdir()
        (folder / "deep" / "more.txt").write_text(f"{scale + 1}\n")

    def product(folder: Path) -> None:
        read = output_dir / "numbers"
        one, two = (read / "numbers.txt").read_text(), (read / "deep" / "more.txt").read_text()
        moment()
        (folder / "product.txt").write_text(f"{int(one) * int(two)}\n")

    return [
        Stage("numbers", {"scale": scale}, [], numbers),
        Stage("product", {}, ["numbers"], product),
    ]


def run(output_dir: str, scale: int, at: int) -> None:
    """Fork, so that what is slow to import is imported once, and wait for the end."""
    global kill_at
    child = os.fork()
    if child == 0:
        kill_at = at
        try:
            run_stages(pipeline(Path(output_dir), scale), output_dir, log=lambda line: None)
            print(moments, flush=True)
            os._exit(0)
        except BaseException:  # whatever it was: what follows is the parent's
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if status == signal.SIGKILL:
        print("killed", flush=True)
    elif status:
        sys.exit(f"a run ended with {status}")


if __name__ == "__main__":
    gc.freeze()  # stages collect garbage: let them skip what was imported
    for each in json.loads(sys.argv[1]):
        run(*each)
