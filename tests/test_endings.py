"""How commands end that a signal, a full disk or a vanished file stops, and go on afterwards."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_align.checkpoint_file import load_sound
from lit_align.files import LOCK_NAME

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[1]
FIT = ["fit", "--config", "configs/sft_tiny.yaml", "--trainer.enable_progress_bar", "false"]
SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0", "SLURM_JOB_NAME": "lit-align",
}  # fmt: skip


class Commands:
    """Starts commands and waits for them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.script = subprocess.Popen(
            [sys.executable, "-m", "tests.command_script"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _ask(self, **what) -> int:
        self.script.stdin.write(json.dumps(what) + "\n")
        self.script.stdin.flush()
        return int(self.script.stdout.readline())

    def start(self, words, **environment: str) -> int:
        self.count += 1
        words = [str(word) for word in words]
        return self._ask(words=words, said=str(self._said()), environment=environment)

    def wait(self, process: int) -> int:
        return self._ask(wait=process)

    def run(self, words, **environment: str) -> tuple[int, str]:
        """How it ended, and the last thing that it said."""
        status = self.wait(self.start(words, **environment))
        return status, self.said().strip().splitlines()[-1]

    def said(self) -> str:
        return self._said().read_text("utf-8", "replace")

    def _said(self) -> Path:
        return self.folder / f"said-{self.count}"


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    running = Commands(tmp_path_factory.mktemp("said"))
    yield running
    running.script.stdin.close()
    running.script.wait(timeout=60)


def fit(model: Path, folder: Path, *more: str) -> list[str]:
    return [*FIT, f"--model.init_args.model={model}", f"--trainer.default_root_dir={folder}", *more]


def last(folder: Path) -> dict[str, torch.Tensor]:
    paths = folder.glob("checkpoints/*.ckpt")
    return load_sound(max(paths, key=lambda p: p.stat().st_mtime_ns))["state_dict"]


def assert_same_end(one: Path, other: Path) -> None:
    a, b = last(one), last(other)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def first_checkpoint(folder: Path) -> None:
    """Wait for it."""
    for _ in range(6000):
        if any(folder.glob("checkpoints/*.ckpt")):
            return
        time.sleep(0.01)
    raise AssertionError("there was no checkpoint in a minute")


LONGER = "--trainer.max_epochs=40"


@pytest.fixture(scope="module")
def whole(commands, tiny_llama_dir, tmp_path_factory) -> Path:
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    assert commands.run(fit(tiny_llama_dir, folder, LONGER))[0] == 0
    return folder


# ---- signals, and two runs in one folder -----------------------------------------------------


def test_sigterm_of_a_command_started_as_users_do(commands, whole, tiny_llama_dir, tmp_path):
    words = [sys.executable, "-m", "lit_align.cli", *fit(tiny_llama_dir, tmp_path, LONGER)]
    run = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    first_checkpoint(tmp_path)
    run.terminate()
    _, said = run.communicate(timeout=100)
    assert run.returncode == 143
    assert "SIGTERM: the run is saved at step" in said and "Traceback" not in said
    again = fit(tiny_llama_dir, tmp_path, LONGER, "--ckpt_path=last")
    assert commands.run(again)[0] == 0
    assert_same_end(tmp_path, whole)


@pytest.mark.parametrize("more", [(), ("--trainer.callbacks+=lit_align.callbacks.Checkpointing",)])
def test_sigterm_with_a_callback_of_lightnings(more, commands, whole, tiny_llama_dir, tmp_path):
    """Alone it saves at its own times; with ours beside it, there too."""
    own = ("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true")
    words = fit(tiny_llama_dir, tmp_path, LONGER, *own, *more)
    process = commands.start(words)
    for _ in range(6000):
        if any(tmp_path.rglob("last.ckpt")):
            break
        time.sleep(0.01)
    os.kill(process, signal.SIGTERM)
    assert commands.wait(process) == 143
    assert ("SIGTERM: the run is saved" in commands.said()) == bool(more)
    if more:
        assert commands.run([*words, "--ckpt_path=last"])[0] == 0
        assert_same_end(tmp_path, whole)


def test_slurm_preempts_and_the_job_goes_on(commands, whole, tiny_llama_dir, tmp_path):
    """Its signal saves and asks for another turn, and SIGTERM ends it; then its node dies."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    job = SLURM | {"PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    words = fit(tiny_llama_dir, tmp_path, LONGER)
    process = commands.start(words, **job)
    first_checkpoint(tmp_path)
    os.kill(process, signal.SIGUSR1)
    while not (tmp_path / "asked").exists():
        time.sleep(0.01)
    os.kill(process, signal.SIGTERM)
    assert commands.wait(process) == 143
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    names = {path.name for path in tmp_path.glob("hpc_ckpt_*")}
    assert names == {"hpc_ckpt_1.ckpt", "hpc_ckpt_2.ckpt"}
    shutil.rmtree(tmp_path / "checkpoints")
    process = commands.start(words, **job)
    first_checkpoint(tmp_path)
    os.kill(process, signal.SIGKILL)
    assert commands.wait(process) == -signal.SIGKILL
    status, _ = commands.run(words, **job)
    assert status == 0
    assert "is the newest sound checkpoint: read in place of" in commands.said()
    assert_same_end(tmp_path, whole)


def test_one_folder_takes_one_run(commands, tiny_llama_dir, tmp_path):
    """Of any two commands; the lock goes with its process, however that ends."""
    words = fit(tiny_llama_dir, tmp_path, LONGER)
    pipeline = ["allo", "--config", "configs/allo_tiny.yaml", "--model", tiny_llama_dir]
    first = commands.start(words)
    first_checkpoint(tmp_path)
    os.kill(first, signal.SIGSTOP)
    for second in (words, [*pipeline, "--output", tmp_path]):
        status, said = commands.run(second)
        assert status == 1 and said.startswith(f"lit-align: another run (process {first} on")
    os.kill(first, signal.SIGKILL)
    commands.wait(first)
    piped = tmp_path / "piped"
    first = commands.start([*pipeline, "--output", piped])
    while not (piped / "manifest.json").exists():
        time.sleep(0.01)
    os.kill(first, signal.SIGSTOP)
    for second in ([*pipeline, "--output", piped], fit(tiny_llama_dir, piped)):
        status, said = commands.run(second)
        assert status == 1 and said.startswith(f"lit-align: another run (process {first} on")
    os.kill(first, signal.SIGKILL)
    commands.wait(first)


@pytest.mark.parametrize(
    "own",
    [
        ("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true"),
        ("--trainer.enable_checkpointing=false",),
    ],
)
def test_one_folder_takes_one_run_whoever_saves(own, commands, tiny_llama_dir, tmp_path):
    words = fit(tiny_llama_dir, tmp_path, LONGER, *own)
    first = commands.start(words)
    lock = tmp_path / LOCK_NAME
    while not (lock.exists() and lock.read_text()):
        time.sleep(0.01)
    os.kill(first, signal.SIGSTOP)
    status, said = commands.run(words)
    os.kill(first, signal.SIGKILL)
    commands.wait(first)
    assert status == 1 and said.startswith(f"lit-align: another run (process {first} on")


# ---- disks -----------------------------------------------------------------------------------


def test_a_full_disk_amid_training(commands, disk, tiny_llama_dir, tmp_path):
    folder = disk("size=600k")  # room for one checkpoint
    assert commands.run(fit(tiny_llama_dir, tmp_path / "whole"))[0] == 0
    status, said = commands.run(fit(tiny_llama_dir, folder))
    assert status == 1
    assert said.startswith(
        f"lit-align: {folder}/checkpoints/step=10.ckpt: the checkpoint could not be written (No "
        "space left on device); the ones before it are as they were"
    )
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step=5.ckpt"]
    assert load_sound(folder / "checkpoints" / "step=5.ckpt")["global_step"] == 5
    disk("size=4m")
    assert commands.run(fit(tiny_llama_dir, folder, "--ckpt_path=last"))[0] == 0
    assert_same_end(folder, tmp_path / "whole")


@pytest.fixture(scope="module")
def mask_and_delta(commands, tiny_llama_dir, tmp_path_factory) -> dict[str, bytes]:
    """What ALLO exports where there is room."""
    folder = tmp_path_factory.mktemp("allo")
    words = ["allo", "--config", "configs/allo_tiny.yaml", "--model", tiny_llama_dir]
    assert commands.run([*words, "--output", folder])[0] == 0
    return {p.name: p.read_bytes() for p in (folder / "export").iterdir() if p.is_file()}


@pytest.mark.parametrize("size", ["100k", "300k", "500k"])
def test_a_full_disk_amid_a_pipeline(size, commands, mask_and_delta, disk, tiny_llama_dir):
    """It goes on from the stages that were done."""
    folder = disk(f"size={size}")
    words = ["allo", "--config", "configs/allo_tiny.yaml", "--model", tiny_llama_dir]
    words += ["--output", folder]
    status, said = commands.run(words)
    assert status == 1 and "Traceback" not in commands.said()
    assert "No space left on device" in said and said.endswith("and start again")
    disk("size=4m")
    assert commands.run(words)[0] == 0
    found = {p.name: p.read_bytes() for p in (folder / "export").iterdir() if p.is_file()}
    assert found == mask_and_delta


@pytest.mark.parametrize("what", ["mask", "delta"])
def test_a_full_disk_where_a_file_is_written(what, commands, disk, tiny_llama_dir, tmp_path):
    """What stood there before still does."""
    folder = disk("size=12k")
    if what == "mask":
        path = folder / "mask.safetensors"
        words = ["localize", "--model", tiny_llama_dir, "--method", "random", "--output", path]
        larger = [*words, "--ratio", "0.3"]
        assert commands.run([*words, "--ratio", "0.1"])[0] == 0
    else:
        assert commands.run(fit(tiny_llama_dir, tmp_path))[0] == 0
        path = folder / "export"
        larger = ["export", "--checkpoint", tmp_path / "checkpoints/step=10.ckpt", "--output", path]
    before = path.read_bytes() if path.is_file() else None
    status, said = commands.run(larger)
    assert status == 1 and "No space left on device" in said
    assert (path.read_bytes() if path.is_file() else None) == before
    assert not list(folder.rglob("*.partial"))


def test_a_full_disk_where_the_references_cache_is(commands, disk, tiny_llama_dir, tmp_path):
    folder = disk("size=4k")
    (folder / "filler").write_bytes(bytes(4096))
    words = [*fit(tiny_llama_dir, tmp_path), f"--model.init_args.reference_cache={folder}/cache"]
    words[2] = "configs/masked_dpo_tiny.yaml"
    status, said = commands.run(words)
    assert status == 1 and "No space left on device" in said
    disk("size=4m")
    assert commands.run(words)[0] == 0


@pytest.mark.parametrize("how", ["read-only", "a file"])
def test_a_folder_that_cannot_be_written(how, commands, disk, tiny_llama_dir, tmp_path):
    folder = tmp_path / "file"
    folder.write_text("")
    if how == "read-only":
        folder = disk("size=1m")
        disk("ro")
    pipeline = ["alps", "--config", "configs/alps_tiny.yaml", "--model", tiny_llama_dir]
    for words in (fit(tiny_llama_dir, folder), [*pipeline, "--output", folder]):
        status, said = commands.run(words)
        assert status == 1 and "Traceback" not in commands.said()
        assert said.startswith("lit-align: ") and str(folder) in said


# ---- data and numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [True, False])
def test_a_file_that_vanishes_while_it_is_used(streaming, commands, tiny_llama_dir, tmp_path):
    """A stream is opened again for every epoch; other rows are in memory."""
    rows = tmp_path / "rows.jsonl"
    shutil.copy(ROOT / "configs/data/sft.jsonl", rows)
    words = fit(tiny_llama_dir, tmp_path, f"--data.init_args.train_file={rows}", LONGER)
    if streaming:
        words += ["--data.init_args.streaming=true", "--trainer.max_steps=150"]
    process = commands.start(words)
    first_checkpoint(tmp_path)
    rows.unlink()
    assert commands.wait(process) == (1 if streaming else 0), commands.said()
    if streaming:
        assert f"lit-align: {rows}: " in commands.said().splitlines()[-1]
        assert last(tmp_path)


def test_numbers_that_leave_their_range(commands, tiny_llama_dir, tmp_path):
    """The checkpoints that are there stay."""
    assert commands.run(fit(tiny_llama_dir, tmp_path))[0] == 0
    before = last(tmp_path)
    rate = ["--model.init_args.learning_rate=1e30", "--model.init_args.warmup_ratio=0"]
    status, said = commands.run(fit(tiny_llama_dir, tmp_path, *rate))
    assert status == 1 and ("not finite" in said or "loss is nan" in said), commands.said()
    assert all(torch.equal(before[name], t) for name, t in last(tmp_path).items())


@pytest.mark.parametrize("name", ["allo", "alps", "ila"])
def test_a_pipeline_killed_inside_every_stage(name, commands, tiny_llama_dir, tmp_path):
    """When each stage has just begun."""
    words = [name, "--config", f"configs/{name}_tiny.yaml", "--model", tiny_llama_dir, "--output"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert commands.run([*words, whole])[0] == 0
    stages = json.loads((whole / "manifest.json").read_text())["stages"]
    kills = 0
    for stage in [record["name"] for record in stages]:
        process = commands.start([*words, killed])
        begun, done = killed / f".stage-{stage}.partial", killed / stage
        while not begun.exists() and not done.exists():
            time.sleep(0.002)
        time.sleep(0.05)
        os.kill(process, signal.SIGKILL)
        kills += commands.wait(process) == -signal.SIGKILL
    assert kills >= len(stages) - 2  # the last ones are over before the signal is there
    assert commands.run([*words, killed])[0] == 0
    compared = [p.relative_to(whole) for p in whole.rglob("*.safetensors")]
    assert compared
    for path in compared:
        one, other = load_file(whole / path), load_file(killed / path)
        assert one.keys() == other.keys(), path
        assert all(torch.equal(one[key], other[key]) for key in one), path


def test_last_by_its_name_stands_for_the_newest_sound_one(commands, tiny_llama_dir, tmp_path):
    """As Lightning's own ModelCheckpoint writes it, with `save_last`."""
    once = "--trainer.max_epochs=1"
    assert commands.run(fit(tiny_llama_dir, tmp_path, once))[0] == 0
    newest = next((tmp_path / "checkpoints").glob("*.ckpt"))
    path = newest.with_name("last.ckpt")
    path.write_bytes(newest.read_bytes()[:-1000])
    assert commands.run(fit(tiny_llama_dir, tmp_path, once, f"--ckpt_path={path}"))[0] == 0
    assert f"{newest} is the newest sound checkpoint: read in place of {path}" in commands.said()
