"""A small pipeline that a test runs in a process of its own and kills at a chosen moment.

Usage: python pipeline_script.py OUTPUT_DIR SCALE KILL_AT
KILL_AT counts the moments (before and after each rename, inside each stage); 0 never kills.
Prints how many moments there were.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

from lit_align.pipelines.stage import Stage, run_stages

moments = 0


def moment() -> None:
    global moments
    moments += 1
    if moments == int(sys.argv[3]):
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


if __name__ == "__main__":
    run_stages(pipeline(Path(sys.argv[1]), int(sys.argv[2])), sys.argv[1], log=lambda line: None)
    print(moments)
