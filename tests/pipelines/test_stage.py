import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lit_align.errors import PipelineError
from lit_align.pipelines.manifest import load_manifest
from lit_align.pipelines.stage import Stage, run_stages

SCRIPT = Path(__file__).with_name("pipeline_script.py")


class Pipeline:
    """Two stages over a file; counts how often each runs."""

    def __init__(self, folder: Path):
        self.output_dir, self.source = folder / "run", folder / "source.txt"
        self.source.write_text("abc")
        self.ran: list[str] = []
        self.lines: list[str] = []

    def upper(self, folder: Path) -> None:
        self.ran.append("upper")
        (folder / "text.txt").write_text(self.source.read_text().upper())

    def twice(self, folder: Path) -> None:
        self.ran.append("twice")
        text = (self.output_dir / "upper" / "text.txt").read_text()
        (folder / "text.txt").write_text(text * 2)

    def stages(self, version: int = 1, **config) -> list[Stage]:
        return [
            Stage("upper", {}, [self.source], self.upper, version),
            Stage("twice", {"count": 2, **config}, ["upper"], self.twice),
        ]

    def run(self, stages: list[Stage] | None = None, **config):
        self.ran.clear()
        self.lines.clear()
        return run_stages(stages or self.stages(**config), self.output_dir, log=self.lines.append)


@pytest.fixture
def pipeline(tmp_path) -> Pipeline:
    return Pipeline(tmp_path)


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_runs_once_then_skips(pipeline):
    records = pipeline.run()
    assert pipeline.ran == ["upper", "twice"]
    assert (pipeline.output_dir / "twice" / "text.txt").read_text() == "ABCABC"
    assert pipeline.run() == records
    assert pipeline.ran == []
    assert pipeline.lines == ["[upper] done before, skipped", "[twice] done before, skipped"]
    assert hidden(pipeline.output_dir) == [".lock"]


def test_record_holds_time_memory_and_files(pipeline):
    record = pipeline.run()["twice"]
    assert load_manifest(pipeline.output_dir).stages["twice"] == record
    assert record.files[0].path == "text.txt"
    assert record.files[0].size_bytes == 6
    assert record.seconds >= 0
    assert record.peak_rss_mib is None or record.peak_rss_mib > 1


@pytest.mark.parametrize(
    ("change", "ran", "line"),
    [
        (lambda p: p.run(extra=1), ["twice"], "[twice] running again: extra changed"),
        (lambda p: p.run(count=3), ["twice"], "[twice] running again: count changed"),
        (
            lambda p: (p.source.write_text("xyz"), p.run()),
            ["upper", "twice"],
            "[twice] running again: input upper changed",
        ),
        (lambda p: p.run(p.stages(version=2)), ["upper", "twice"], "version (1 (lit-align"),
    ],
)
def test_a_change_reruns_what_depends_on_it(pipeline, change, ran, line):
    pipeline.run()
    change(pipeline)
    assert pipeline.ran == ran
    assert any(line in said for said in pipeline.lines)


def test_moving_an_input_or_the_run_changes_nothing(pipeline, tmp_path):
    pipeline.run()
    pipeline.source = pipeline.source.rename(tmp_path / "moved.txt")
    pipeline.output_dir = pipeline.output_dir.rename(tmp_path / "moved run")
    pipeline.run()
    assert pipeline.ran == []


def test_what_a_stage_logs_is_recorded_but_nothing_depends_on_it(pipeline):
    seconds = iter("12")
    upper, twice = pipeline.stages()

    def timed(folder: Path) -> None:
        pipeline.upper(folder)
        (folder / "logs").mkdir()
        (folder / "logs" / "metrics.csv").write_text(next(seconds))

    logged = [Stage("upper", {}, upper.inputs, timed), twice]
    pipeline.run(logged)
    shutil.rmtree(pipeline.output_dir / "upper")
    records = pipeline.run(logged)
    assert pipeline.ran == ["upper"]
    assert [file.path for file in records["upper"].files] == ["logs/metrics.csv", "text.txt"]


@pytest.mark.parametrize("harm", ["flip", "shorten", "remove", "remove_folder"])
def test_a_damaged_output_is_made_again(pipeline, harm):
    pipeline.run()
    folder = pipeline.output_dir / "upper"
    if harm == "remove_folder":
        shutil.rmtree(folder)
    elif harm == "remove":
        (folder / "text.txt").unlink()
    else:
        (folder / "text.txt").write_text("ABD" if harm == "flip" else "A")
    pipeline.run()
    assert pipeline.ran == ["upper"]  # same bytes as before, so what was made from them stands
    assert "running again: " in pipeline.lines[0]
    assert str(folder) in pipeline.lines[0]
    assert (folder / "text.txt").read_text() == "ABC"


def test_a_failed_stage_keeps_the_old_outputs_and_says_where_it_stopped(pipeline):
    pipeline.run()

    def fail(folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise ValueError("the loss is nan")

    broken = [pipeline.stages()[0], Stage("twice", {"count": 4}, ["upper"], fail)]
    with pytest.raises(ValueError, match="the loss is nan") as raised:
        pipeline.run(broken)
    partial = pipeline.output_dir / ".stage-twice.partial"
    assert str(partial) in raised.value.__notes__[0]
    assert (partial / "half.txt").exists()
    assert (pipeline.output_dir / "twice" / "text.txt").read_text() == "ABCABC"
    pipeline.run()
    assert pipeline.ran == []
    assert hidden(pipeline.output_dir) == [".lock"]


def nothing(folder: Path) -> None:
    (folder / "x").write_text("")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([Stage("../up", {}, [], nothing)], "not a stage's name"),
        ([Stage("a", {}, [], nothing), Stage("A", {}, [], nothing)], "two stages"),
        ([Stage("a", {}, ["b"], nothing)], "is no stage"),
        ([Stage("a", {}, ["b"], nothing), Stage("b", {}, [], nothing)], "comes later"),
        ([Stage("a", {}, [Path("absent.txt")], nothing)], "does not exist"),
        ([Stage("a", {"lr": float("nan")}, [], nothing)], "not JSON"),
        ([Stage("a", {"model": object()}, [], nothing)], "not JSON"),
        ([Stage("a", {}, [], lambda folder: None)], "wrote no file"),
        ([Stage("a", {}, [], lambda folder: (folder / "x").symlink_to("/etc"))], "plain files"),
    ],
)
def test_wrong_stages_are_named(tmp_path, stages, message):
    with pytest.raises(PipelineError, match=message):
        run_stages(stages, tmp_path / "run")
    assert not (tmp_path / "run" / "a").exists()


def test_never_replaces_a_folder_it_did_not_write(pipeline):
    mine = pipeline.output_dir / "upper"
    mine.mkdir(parents=True)
    (mine / "thesis.txt").write_text("mine")
    with pytest.raises(PipelineError, match="not written by a stage"):
        pipeline.run()
    assert (mine / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.update(format_version=2),
        lambda m: m["stages"][0]["files"][0].update(path="../../source.txt"),
        lambda m: m["stages"][0]["files"][0].update(path="/etc/passwd"),
        lambda m: m["stages"][0]["files"][0].update(path="a\\..\\b"),
        lambda m: m["stages"][0]["files"][0].update(path="C:x"),
        lambda m: m["stages"][0]["files"][0].update(size_bytes=-1),
        lambda m: m["stages"][0]["files"][0].update(sha256="no"),
        lambda m: m["stages"][0].update(name=".."),
        lambda m: m["stages"][0].pop("hash"),
        lambda m: m["stages"][0].update(surprise=1),
        lambda m: m.update(stages=[1]),
    ],
)
def test_a_damaged_manifest_is_an_error(pipeline, edit):
    pipeline.run()
    path = pipeline.output_dir / "manifest.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(PipelineError, match=r"manifest\.json cannot be used"):
        pipeline.run()
    assert pipeline.ran == []


def test_a_second_run_in_the_same_folder_refuses(pipeline):
    def nested(folder: Path) -> None:
        run_stages([Stage("b", {}, [], nothing)], pipeline.output_dir)

    with pytest.raises(PipelineError, match="another run"):
        run_stages([Stage("a", {}, [], nested)], pipeline.output_dir)
    pipeline.run()  # and the lock is let go


def script(*runs: tuple[Path, int, int]) -> list[str]:
    """Runs of `pipeline_script`, one after the other: what each printed."""
    words = json.dumps([(str(folder), scale, kill_at) for folder, scale, kill_at in runs])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), words], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def outputs(folder: Path) -> dict[str, str]:
    kept = sorted(path for path in folder.rglob("*.txt"))
    return {path.relative_to(folder).as_posix(): path.read_text() for path in kept}


def test_killed_anywhere_ends_in_the_same_result(tmp_path):
    """SIGKILL before and after every rename and removal, and inside stages; then run again."""
    expected = {"numbers/numbers.txt": "5\n", "numbers/deep/more.txt": "6\n"}
    expected["product/product.txt"] = "30\n"
    before, whole = tmp_path / "before", tmp_path / "whole"
    *_, last = script((before, 3, 0), (whole, 3, 0), (whole, 5, 0))
    moments = int(last)
    assert outputs(whole) == expected
    assert moments >= 16
    killed = {k: tmp_path / f"killed at {k}" for k in range(1, moments + 1)}
    for run in killed.values():
        shutil.copytree(before, run)  # so that the runs replace older outputs
    printed = script(*((run, 5, at) for k, run in killed.items() for at in (k, 0)))
    assert printed[::2] == moments * ["killed"]
    assert len(printed) == 2 * moments and "killed" not in printed[1::2]
    for k, run in killed.items():
        assert outputs(run) == expected, k
        assert hidden(run) == [".lock"], k
