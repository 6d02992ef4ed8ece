"""`manifest.json`: which stages of a run are done, from what, and the bytes that each one wrote."""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lit_align.errors import PipelineError
from lit_align.files import sha256_of_file, write_atomically
from lit_align.strict_json import read_json_file

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
SHA256 = re.compile(r"[0-9a-f]{64}")
PEAK_SCOPES = ("stage", "process", "unknown")


@dataclass(frozen=True)
class FileRecord:
    """One output file: its path inside the stage's folder, size and SHA-256."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class StageRecord:
    """A finished stage.

    Attributes:
        name: The stage, and the folder in the run's output folder that holds its files.
        hash: SHA-256 over config, inputs and version: the stage is skipped while it is the same.
        version: The stage's own version and lit-align's.
        config: The settings that the stage ran with.
        inputs: One `{"stage" or "path": what, "sha256": digest}` for each input.
        files: Every file that the stage wrote, by path.
        seconds: Wall-clock time.
        peak_rss_mib: Peak resident memory of this process, in MiB; None where it cannot be read.
        peak_rss_scope: "stage", or "process" where the system keeps one peak for the whole life.
        finished_at: UTC, ISO 8601.
    """

    name: str
    hash: str
    version: str
    config: dict[str, Any]
    inputs: tuple[dict[str, str], ...]
    files: tuple[FileRecord, ...]
    seconds: float
    peak_rss_mib: float | None
    peak_rss_scope: str
    finished_at: str

    def damage(self, folder: Path) -> str | None:
        """What is wrong with the outputs in `folder`, or None where every byte is as recorded."""
        if folder.is_symlink() or not folder.is_dir():
            return f"{folder} is not a folder"
        for file in self.files:
            path = folder / file.path
            if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
                return f"{path} is missing"
            if path.stat().st_size != file.size_bytes or sha256_of_file(path) != file.sha256:
                return f"{path} is not what the stage wrote"
        return None

    def stranger(self, folder: Path) -> Path | None:
        """A link or file in `folder` that the stage did not write; hidden ones do not count.

        What reads a model's folder finds files by their names, and would take it along.
        """
        known = {file.path for file in self.files}
        for path in sorted(folder.rglob("*")):
            place = path.relative_to(folder)
            is_other = path.is_symlink() or (not path.is_dir() and place.as_posix() not in known)
            if is_other and not any(part.startswith(".") for part in place.parts):
                return path
        return None


@dataclass
class Manifest:
    """The finished stages of one output folder, by name."""

    stages: dict[str, StageRecord] = field(default_factory=dict)

    def save(self, output_dir: Path) -> None:
        """Write `manifest.json` whole or not at all."""
        content = {
            "format_version": FORMAT_VERSION,
            "stages": [asdict(record) for record in self.stages.values()],
        }
        data = json.dumps(content, indent=1, ensure_ascii=True) + "\n"
        write_atomically(output_dir / MANIFEST_NAME, data.encode())


def load_manifest(output_dir: Path) -> Manifest:
    """Read and check `manifest.json`; an output folder without one has no finished stage.

    Raises:
        PipelineError: The file is not JSON, of another format, or names a path outside its stage.
    """
    path = output_dir / MANIFEST_NAME
    if not path.exists():
        return Manifest()
    try:
        content = read_json_file(path)
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version {content['format_version']!r:.40} is not known")
        records = [_stage_record(entry) for entry in content["stages"]]
        _require(len({record.name for record in records}) == len(records), "a stage twice")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PipelineError(
            f"{path} cannot be used ({type(error).__name__}: {error}); restore it, or choose "
            "another output folder"
        ) from error
    return Manifest({record.name: record for record in records})


def _stage_record(entry: dict[str, Any]) -> StageRecord:
    """Rebuild one record; ValueError, KeyError or TypeError where the entry is not one of ours."""
    record = StageRecord(
        **{
            **entry,
            "files": tuple(_file_record(file) for file in entry["files"]),
            "inputs": tuple(dict(given) for given in entry["inputs"]),
        }
    )
    _require(_is_text(STAGE_NAME, record.name), f"the stage's name {record.name!r:.80}")
    _require(_is_text(SHA256, record.hash), f"hash of {record.name!r}")
    _require(isinstance(record.config, dict), f"config of {record.name!r}")
    _require(all(map(_is_input, record.inputs)), f"an input of {record.name!r}")
    _require(bool(record.files), f"{record.name!r} without a file")
    paths = {file.path for file in record.files}
    _require(len(paths) == len(record.files), f"{record.name!r} with a file that is there twice")
    _require(_is_size(record.seconds), f"seconds of {record.name!r}")
    peak = record.peak_rss_mib
    _require(peak is None or _is_size(peak), f"peak_rss_mib of {record.name!r}")
    _require(record.peak_rss_scope in PEAK_SCOPES, f"peak_rss_scope of {record.name!r}")
    texts = record.version, record.finished_at
    _require(all(isinstance(text, str) for text in texts), f"version or time of {record.name!r}")
    return record


def _file_record(entry: dict[str, Any]) -> FileRecord:
    file = FileRecord(**entry)
    _require(isinstance(file.path, str) and is_inside(file.path), f"path {file.path!r:.200}")
    is_size = type(file.size_bytes) is int and file.size_bytes >= 0
    _require(is_size, f"size of {file.path!r}")
    _require(_is_text(SHA256, file.sha256), f"sha256 of {file.path!r}")
    return file


def is_inside(path: str) -> bool:
    """Whether a relative POSIX path can only mean a file below the folder it is joined to.

    One that no file system takes, or that would act on a terminal, is none either.
    """
    parts = PurePosixPath(path)
    climbs = parts.is_absolute() or ".." in parts.parts or PureWindowsPath(path).drive
    if climbs or str(parts) != path or path == "." or "\\" in path or not path.isprintable():
        return False
    return len(path) <= 1024 and all(len(part.encode()) <= 255 for part in parts.parts)


def _is_input(given: dict[str, Any]) -> bool:
    named = given.keys() in ({"stage", "sha256"}, {"path", "sha256"})
    return (
        named
        and all(isinstance(v, str) for v in given.values())
        and _is_text(SHA256, given["sha256"])
    )


def _is_text(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and bool(pattern.fullmatch(value))


def _is_size(value: Any) -> bool:
    return type(value) in (int, float) and value >= 0


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"{what} is not valid")
