"""Runs `lit-align` in forks of one process, so that what is slow to import is imported once.

Usage: python -m tests.command_script, then a line of JSON on stdin for each:
{"words": [...], "said": file, "environment": {...}} starts one and prints its process's id;
{"wait": id} prints the status that it ended with.
"""

import gc
import json
import os
import sys
import traceback

import torch

from lit_align.cli import main


def start(words: list[str], said: str, environment: dict[str, str]) -> int:
    """Fork; what the fork says goes into a file."""
    child = os.fork()
    if child:
        return child
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(environment)
    status = 0
    try:
        main(words)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:  # as Python ends: with the traceback
        traceback.print_exc()
        status = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            status = os.waitpid(asked["wait"], 0)[1]
            print(os.waitstatus_to_exitcode(status), flush=True)
        else:
            print(start(**asked), flush=True)
