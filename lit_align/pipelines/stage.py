"""A pipeline is a list of stages: resumable, written whole or not at all, skipped when done."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lit_align
from lit_align.errors import PipelineError
from lit_align.files import sha256_of_file
from lit_align.peak_memory import PeakMemory
from lit_align.pipelines.manifest import STAGE_NAME, Manifest, StageRecord, load_manifest
from lit_align.pipelines.run_folder import folder_lock, partial_folder, publish, recover, seal

LOGS = "logs/"  # in a stage's folder: no other stage reads what is there


@dataclass(frozen=True)
class Stage:
    """One step of a pipeline.

    Attributes:
        name: Letters, digits, `_` and `-`; its outputs stand in `<output_dir>/<name>/`.
        config: Every setting that the outputs depend on: anything JSON can hold, and paths.
        inputs: Files or folders (`Path`) that are read, and names (`str`) of earlier stages.
        run: Called with an empty folder to write the outputs into. It must be deterministic for
            a killed run to end, once run again, in the same result.
        version: Raise it when the stage's code changes what it writes.
    """

    name: str
    config: Mapping[str, Any]
    inputs: Sequence[Path | str]
    run: Callable[[Path], None]
    version: int = 1


@dataclass(frozen=True)
class _Plan:
    """What a stage would be done from: compared with the record of what it was done from."""

    version: str
    config: dict[str, Any]
    inputs: tuple[dict[str, str], ...]
    hash: str


def run_stages(
    stages: Sequence[Stage], output_dir: str | Path, *, log: Callable[[str], None] = print
) -> dict[str, StageRecord]:
    """Run the stages in order; skip each one that is done with the same config and inputs.

    A stage writes into a hidden sibling of its folder that is made durable and renamed when it is
    done, so a folder under a stage's name is always complete. Its hash covers its config, its
    version, lit-align's version, the bytes of its files and, for earlier stages, their hash and
    the bytes that they wrote outside `logs/`; where it or an output changed, the stage runs again
    and its old outputs go when the new ones are whole. Stages of earlier runs that `stages` lacks
    stay on disk and in the manifest. A stage that raises leaves what it wrote, for you to look at,
    until the next run.

    Args:
        stages: The pipeline; an input may name only a stage before it.
        output_dir: Made where it is missing; holds the stages' folders and `manifest.json`.
        log: Called with one line for each stage that starts, ends or is skipped.

    Returns:
        The record of every stage, in order.

    Raises:
        PipelineError: Names that are wrong or taken, a missing input, a config that JSON cannot
            hold, another run in the folder, or a manifest that cannot be used.
    """
    _check_stages(stages)
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with folder_lock(output_dir):
        manifest = load_manifest(output_dir)
        recover(output_dir, manifest)
        for stage in stages:
            _check_folder(stage.name, output_dir, manifest)
        done: dict[str, StageRecord] = {}
        for stage in stages:
            plan = _plan(stage, done)
            reason = _reason_to_run(plan, manifest.stages.get(stage.name), output_dir / stage.name)
            if reason is None:
                log(f"[{stage.name}] done before, skipped")
            else:
                log(f"[{stage.name}] {reason}")
                manifest.stages[stage.name] = record = _run(stage, plan, output_dir)
                manifest.save(output_dir)  # before the move: see run_folder
                publish(output_dir, stage.name)
                log(f"[{stage.name}] done in {record.seconds:.1f} s")
            done[stage.name] = manifest.stages[stage.name]
    return done


def _run(stage: Stage, plan: _Plan, output_dir: Path) -> StageRecord:
    """Run one stage into its partial folder and seal that."""
    folder = partial_folder(output_dir, stage.name)
    folder.mkdir()
    started = time.perf_counter()
    try:
        with PeakMemory() as peak:
            stage.run(folder)
    except BaseException as error:
        error.add_note(
            f"stage {stage.name!r} did not finish; what it wrote is in {folder} until the next run"
        )
        raise
    return StageRecord(
        name=stage.name,
        hash=plan.hash,
        version=plan.version,
        config=plan.config,
        inputs=plan.inputs,
        files=seal(folder),
        seconds=round(time.perf_counter() - started, 3),
        peak_rss_mib=None if peak.mib is None else round(peak.mib, 1),
        peak_rss_scope=peak.scope,
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _plan(stage: Stage, done: Mapping[str, StageRecord]) -> _Plan:
    version = f"{stage.version} (lit-align {lit_align.__version__})"
    config = json.loads(_canonical_json(stage.config, stage.name))
    inputs = tuple(_input_digest(given, stage.name, done) for given in stage.inputs)
    digests = [given["sha256"] for given in inputs]  # not the paths: a model may be moved
    whole = {"name": stage.name, "version": version, "config": config, "inputs": digests}
    return _Plan(version, config, inputs, _digest(_canonical_json(whole, stage.name)))


def _input_digest(
    given: Path | str, reader: str, done: Mapping[str, StageRecord]
) -> dict[str, str]:
    if isinstance(given, str):
        record = done[given]
        # Logs hold timings: what reads the stage does not run again because of them.
        read = (file for file in record.files if not file.path.startswith(LOGS))
        written = [record.hash, *(f"{file.path} {file.sha256}" for file in read)]
        return {"stage": given, "sha256": _digest("\n".join(written))}
    if given.is_file():
        return {"path": str(given), "sha256": sha256_of_file(given)}
    if given.is_dir():
        files = sorted(path for path in given.rglob("*") if path.is_file())
        lines = [f"{path.relative_to(given).as_posix()} {sha256_of_file(path)}" for path in files]
        return {"path": str(given), "sha256": _digest("\n".join(lines))}
    raise PipelineError(f"stage {reader!r} reads {given}, which does not exist")


def _reason_to_run(plan: _Plan, record: StageRecord | None, folder: Path) -> str | None:
    """Why the stage has to run, in words; None where it is done."""
    if record is None:
        return "running"
    if record.hash == plan.hash:
        damage = record.damage(folder)
        return None if damage is None else f"running again: {damage}"
    return f"running again: {', '.join(_changes(plan, record))} changed"


def _changes(plan: _Plan, record: StageRecord) -> list[str]:
    """The settings and inputs that differ from the recorded ones, by name."""
    changed = [key for key in plan.config if key not in record.config]
    changed += [key for key, value in record.config.items() if plan.config.get(key) != value]
    before = [given["sha256"] for given in record.inputs]
    changed += [
        f"input {given.get('stage') or given.get('path')}"
        for given in plan.inputs
        if given["sha256"] not in before
    ]
    if plan.version != record.version:
        changed.append(f"version ({record.version} to {plan.version})")
    return changed or ["the order or number of inputs"]


def _check_stages(stages: Sequence[Stage]) -> None:
    """Find wrong names before anything runs."""
    names: set[str] = set()
    for stage in stages:
        if not STAGE_NAME.fullmatch(stage.name):
            raise PipelineError(f"{stage.name!r} is not a stage's name: letters, digits, _ and -")
        if stage.name.lower() in names:  # file systems may not tell cases apart
            raise PipelineError(f"two stages are called {stage.name!r}")
        for given in stage.inputs:
            if isinstance(given, str) and given not in {s.name for s in stages}:
                raise PipelineError(
                    f"stage {stage.name!r} reads {given!r}, which is no stage "
                    "(files and folders are given as Path)"
                )
            if isinstance(given, str) and given.lower() not in names:
                raise PipelineError(f"stage {stage.name!r} reads {given!r}, which comes later")
        names.add(stage.name.lower())


def _check_folder(name: str, output_dir: Path, manifest: Manifest) -> None:
    """Refuse to replace something that no stage wrote."""
    folder = output_dir / name
    if folder.is_symlink() or (folder.exists() and name not in manifest.stages):
        raise PipelineError(
            f"{folder} was not written by a stage (the manifest does not list it): move it away, "
            "or choose another output folder"
        )
    if folder.is_dir() and (stranger := manifest.stages[name].stranger(folder)):
        raise PipelineError(
            f"{stranger} was not written by stage {name!r} (the manifest does not list it): move "
            "it away, or choose another output folder"
        )


def _canonical_json(value: object, stage_name: str) -> str:
    """The one JSON text of a value: sorted keys, no spaces, paths as text."""
    try:
        return json.dumps(
            value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain
        )
    except (TypeError, ValueError) as error:
        raise PipelineError(f"config of stage {stage_name!r} is not JSON: {error}") from error


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{value!r} is a {type(value).__name__}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
