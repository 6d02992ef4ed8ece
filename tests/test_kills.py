"""SIGKILL whenever it comes: a run that is started again ends like one that was left alone."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.modules.distributed_script import free_port
from tests.training_runs import assert_close_weights

ROOT = Path(__file__).resolve().parents[1]
RANDOM_KILLS = 25
TIMES = ("began", "ended")


def started(model: Path, runs: list[dict], **environment: str) -> subprocess.Popen:
    words = [sys.executable, "-m", "tests.kill_script", str(model), json.dumps(runs)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, cwd=ROOT, env=os.environ | environment, **streams)


def ends(script: subprocess.Popen, all_said: list[str] | None = None) -> list[str]:
    """How its runs ended; what they said is added to a list."""
    try:
        said, _ = script.communicate(timeout=500)
    finally:
        script.kill()
    assert script.returncode == 0, said[-4000:]
    if all_said is not None:
        all_said.append(said)
    return [line for line in said.splitlines() if line.startswith(("killed", "status"))]


def seconds_of(said: str) -> float:
    """How long a run trained, by what it said."""
    began, ended = (float(re.findall(rf"^{word} (.*)$", said, re.M)[0]) for word in TIMES)
    return ended - began


def random_moments(draw: random.Random, seconds: float) -> list[str]:
    """When a run of ten batches is killed, and when once more; the second may come too late."""
    return [f"after:{draw.randint(1, last)}:{draw.uniform(0, 0.15 * seconds)}" for last in (8, 4)]


def final(folder: Path) -> bytes:
    return (folder / "final.safetensors").read_bytes()


def test_killed_inside_a_window_a_write_and_validation(tiny_llama_dir, tmp_path):
    """One run, three times."""
    kills = ("window:3", "write:3", "validation:1", "")
    runs = [{"out": str(tmp_path / "killed"), "kill": kill} for kill in kills]
    found = ends(started(tiny_llama_dir, [{"out": str(tmp_path / "whole")}, *runs]))
    assert found == ["status 0", "killed", "killed", "killed", "status 0"]
    assert final(tmp_path / "killed") == final(tmp_path / "whole")
    assert not list(tmp_path.rglob("*.partial"))  # of the write that was cut off


@pytest.mark.long
def test_killed_at_random_moments(tiny_llama_dir, tmp_path):
    """Each run twice: as it begins, and as it goes on."""
    script = started(tiny_llama_dir, [{"out": str(tmp_path / "whole")}])
    said, _ = script.communicate(timeout=100)
    seconds = seconds_of(said)
    draw = random.Random(0)
    runs, folders = [], [tmp_path / str(i) for i in range(RANDOM_KILLS)]
    for folder in folders:
        kills = random_moments(draw, seconds)
        runs += [{"out": str(folder), "kill": kill} for kill in (*kills, "")]
    found = ends(started(tiny_llama_dir, runs))
    assert set(found[2::3]) == {"status 0"}
    assert found.count("killed") >= RANDOM_KILLS
    for folder in folders:
        assert final(folder) == final(tmp_path / "whole"), folder
        shutil.rmtree(folder)


def on_two(model: Path, runs: list[dict]) -> tuple[list[list[str]], str]:
    """Runs on two ranks; how they ended on each, and what was said."""
    place, said = {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}, []
    ranks = [started(model, runs, **place, LOCAL_RANK=str(rank)) for rank in (0, 1)]
    return [ends(rank, said) for rank in ranks], "".join(said)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_two_ranks_killed_at_random_moments(strategy, tiny_llama_dir, tmp_path):
    """Both, but not at the same time to the millisecond: one may end by the other's death."""

    def run(name: str, kill: str = "") -> dict:
        out = str(tmp_path / name)
        return {"out": out, "kill": kill, "port": free_port(), "strategy": strategy}

    _, said = on_two(tiny_llama_dir, [run("two")])
    seconds, draw = seconds_of(said), random.Random(0)
    runs = []
    for name in "abc":
        runs += [run(name, kill) for kill in (*random_moments(draw, seconds), "")]
    found, said = on_two(tiny_llama_dir, runs)
    for rank in found:
        assert set(rank[2::3]) == {"status 0"}, said[-4000:]
        assert rank.count("killed") >= 2
    ends(started(tiny_llama_dir, [{"out": str(tmp_path / "one")}]))
    one, two, *others = (
        load_file(tmp_path / name / "final.safetensors") for name in ("one", "two", *"abc")
    )
    assert_close_weights(one, two, atol=1e-6)
    for each in others:
        assert_close_weights(two, each, atol=1e-6)


@pytest.mark.long
def test_two_ranks_killed_end_like_one_process(tiny_llama_dir, tmp_path):
    runs = [
        {"out": str(tmp_path / "two"), "kill": kill, "port": free_port()}
        for kill in ("step:2", "window:2", "sigterm:2", "validation:2", "")
    ]
    for rank in on_two(tiny_llama_dir, runs)[0]:
        assert rank == ["killed", "killed", "status 143", "killed", "status 0"]
    ends(started(tiny_llama_dir, [{"out": str(tmp_path / "one")}]))
    one, two = (load_file(tmp_path / name / "final.safetensors") for name in ("one", "two"))
    assert_close_weights(one, two, atol=1e-6)


@pytest.mark.long
def test_ranks_that_find_different_checkpoints_do_not_train(tiny_llama_dir, tmp_path):
    """As where each machine has a disk of its own, and the first rank alone writes."""
    place = {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for kill, ending in (("step:3", "killed"), ("", "status 1")):
        said, port = [], free_port()
        runs = [{"out": str(tmp_path / out), "kill": kill, "port": port} for out in "ab"]
        ranks = [
            started(tiny_llama_dir, [r], **place, LOCAL_RANK=str(i)) for i, r in enumerate(runs)
        ]
        assert [ends(rank, said) for rank in ranks] == [[ending], [ending]], said
    message = "TrainingError: the first rank goes on after step 2, and another one does not: "
    assert len(re.findall(message, "".join(said))) == 2, said


@pytest.mark.long
def test_a_full_disk_is_an_error_of_both_ranks(disk, tiny_llama_dir, tmp_path):
    """The one that does not write would wait for the other."""
    on_two(tiny_llama_dir, [{"out": str(tmp_path / "whole"), "port": free_port()}])
    size = (tmp_path / "whole" / "checkpoints" / "step=6.ckpt").stat().st_size
    folder = disk(f"size={round(1.7 * size)}")
    found, said = on_two(tiny_llama_dir, [{"out": str(folder), "port": free_port()}])
    assert found == [["status 1"], ["status 1"]]
    message = r"step=2\.ckpt: the checkpoint could not be written \(No space left on device\)"
    assert len(re.findall(rf"^\S*TrainingError: .*{message}", said, re.M)) == 2, said[-3000:]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step=1.ckpt"]
    disk("size=4m")
    assert on_two(tiny_llama_dir, [{"out": str(folder), "port": free_port()}])[0][0] == ["status 0"]
    assert final(folder) == final(tmp_path / "whole")
