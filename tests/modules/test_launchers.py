"""torchrun, SLURM and Lightning's own launcher: one config, and nobody waits for the dead."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_align.masks import ParameterMask
from lit_align.modules.checkpointed import read_checkpoint
from tests.modules.distributed_script import ROOT, free_port, start_ranks
from tests.training_runs import assert_close_weights, random_mask

pytestmark = pytest.mark.long
SECONDS = 60  # within which a job ends whose process has died
MACHINES = ("--trainer.strategy=ddp", "--trainer.num_nodes=2", "--trainer.devices=1")
PROCESSES = ("--trainer.strategy=ddp", "--trainer.devices=2")
ENDLESS = ("--trainer.max_epochs=100000", "--trainer.enable_progress_bar=false")
ENV = os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.fixture
def config(tiny_llama_dir, tmp_path):
    """What follows `python` to run configs/masked_dpo_tiny.yaml in `tmp_path`."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")

    def words(out: str, batch_size: int, *more: str) -> list[str]:
        given = ["-m", "lit_align.cli", "fit", "--config", "configs/masked_dpo_tiny.yaml"]
        given += ["--model.init_args.model", str(tiny_llama_dir), "--trainer.default_root_dir", out]
        return [*given, "--data.init_args.batch_size", str(batch_size), *more]

    return words


def start(words: list[str], cwd: Path, **env: str) -> subprocess.Popen:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *words], cwd=cwd, env=ENV | env, **streams)


def torchrun(words: list[str], cwd: Path) -> list[subprocess.Popen]:
    """What two machines would start, each with one process: they meet over TCP on loopback."""
    given = [
        "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1",
        "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}",
        "--rdzv_id", "test", "--local_addr", "127.0.0.1",
    ]  # fmt: skip
    return [start(given + words, cwd) for _ in range(2)]


def srun(words: list[str], cwd: Path) -> list[subprocess.Popen]:
    """What `srun` starts on two nodes: everybody finds its place in SLURM's variables alone."""
    job = {
        "SLURM_JOB_ID": str(number_of_a_job()), "SLURM_JOB_NAME": "align",
        "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2",
        "SLURM_NODELIST": "127.0.0.1,localhost", "SLURM_LOCALID": "0",
    }  # fmt: skip
    return [start(words, cwd, **job, SLURM_PROCID=str(i), SLURM_NODEID=str(i)) for i in (0, 1)]


def number_of_a_job() -> int:
    """Lightning takes the port from it: 15000 and its last four digits."""
    for number in range(os.getpid(), os.getpid() + 1000):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", 15000 + number % 10000)):  # nobody listens there
                return number
    raise OSError("no port is free")


def finish(machines: list[subprocess.Popen]) -> None:
    try:
        for machine in machines:
            printed, _ = machine.communicate(timeout=200)
            assert machine.returncode == 0, printed[-4000:]
    finally:
        stop(machines)


def stop(processes: list[subprocess.Popen]) -> None:
    for each in processes:
        each.kill()
        each.wait()


@pytest.mark.parametrize("launcher", [torchrun, srun])
def test_two_machines_end_like_one_process(launcher, config, tmp_path):
    finish(launcher(config("two", 1, *MACHINES), tmp_path))
    finish([start(config("one", 2, "--trainer.devices=1"), tmp_path)])
    masks = [ParameterMask.load(tmp_path / run / "mask.safetensors") for run in ("one", "two")]
    states = [read_checkpoint(newest(tmp_path / run))["state_dict"] for run in ("one", "two")]
    assert masks[0].digest == masks[1].digest
    assert_close_weights(*states, atol=1e-6)


def newest(run: Path) -> Path:
    return max(run.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)


@pytest.mark.parametrize(("launcher", "victim"), [(torchrun, 1), (srun, 0)])
def test_a_job_ends_where_a_process_is_killed(launcher, victim, config, tmp_path):
    machines = launcher(config("run", 1, *MACHINES, *ENDLESS), tmp_path)
    try:
        wait_for_a_checkpoint(tmp_path / "run", machines)
        # Of a machine with torchrun, the worker and not what looks after it.
        os.kill((children(machines[victim].pid) or [machines[victim].pid])[0], signal.SIGKILL)
        assert_ends(machines[1 - victim])
    finally:
        stop(machines)


@pytest.mark.parametrize("victim", ["first", "second"])
def test_processes_of_one_machine_end_together(victim, config, tmp_path):
    """As Lightning starts them: the first is what the user started, and starts the second."""
    first = start(config("run", 1, *PROCESSES, *ENDLESS), tmp_path)
    try:
        wait_for_a_checkpoint(tmp_path / "run", [first])
        (second,) = children(first.pid)
        os.kill({"first": first.pid, "second": second}[victim], signal.SIGKILL)
        first.wait(timeout=SECONDS)
        assert first.returncode != 0
        deadline = time.monotonic() + SECONDS
        while is_running(second):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        stop([first])


def wait_for_a_checkpoint(run: Path, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 150
    while not list(run.rglob("*.ckpt")):
        assert all(each.poll() is None for each in processes), processes[0].communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)


def children(process: int) -> list[int]:
    return [int(i) for i in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_ends(process: subprocess.Popen) -> None:
    """Soon, by itself and with an error that it tells."""
    printed, _ = process.communicate(timeout=SECONDS)
    assert process.returncode not in (0, -signal.SIGKILL), printed
    assert "Error" in printed


@pytest.mark.parametrize(
    ("strategy", "how", "victim"),
    [
        ("ddp", "killed", 1),
        ("ddp", "raises", 0),
        ("sharded", "killed", 0),
        ("sharded", "raises", 1),
    ],
)
def test_a_rank_that_dies_ends_the_job(strategy, how, victim, tiny_llama_dir, tmp_path):
    random_mask(0.3).save(tmp_path / "mask")
    settings = {"model": str(tiny_llama_dir), "mask": str(tmp_path / "mask"), "out": str(tmp_path)}
    settings |= {"objective": "sft", "strategy": strategy, "dies": [how, victim]}
    ranks = start_ranks(2, [settings])
    try:
        ended = ranks[victim].wait(timeout=120)
        assert ended == -signal.SIGKILL if how == "killed" else ended > 0
        assert_ends(ranks[1 - victim])
    finally:
        stop(ranks)
