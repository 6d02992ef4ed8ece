"""`manifest.json`: which stages of a run are done, from what, and the bytes that each one wrote."""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lit_align.errors import PipelineError
from lit_align.files import sha256_of_file, write_atomically

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
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version {content['format_version']!r} is not known")
        records = [_stage_record(entry) for entry in content["stages"]]
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
    _require(bool(STAGE_NAME.fullmatch(record.name)), f"{record.name!r} is not a stage's name")
    _require(bool(SHA256.fullmatch(record.hash)), f"hash {record.hash!r} of {record.name!r}")
    _require(isinstance(record.config, dict), f"config of {record.name!r} is not a mapping")
    _require(bool(record.files), f"{record.name!r} lists no file")
    _require(isinstance(record.seconds, int | float), f"seconds of {record.name!r}")
    _require(record.peak_rss_scope in PEAK_SCOPES, f"peak_rss_scope of {record.name!r}")
    return record


def _file_record(entry: dict[str, Any]) -> FileRecord:
    file = FileRecord(**entry)
    _require(is_inside(file.path), f"path {file.path!r}")
    _require(isinstance(file.size_bytes, int) and file.size_bytes >= 0, f"size of {file.path!r}")
    _require(bool(SHA256.fullmatch(file.sha256)), f"sha256 of {file.path!r}")
    return file


def is_inside(path: str) -> bool:
    """Whether a relative POSIX path can only mean a file below the folder it is joined to."""
    parts = PurePosixPath(path)
    climbs = parts.is_absolute() or ".." in parts.parts or PureWindowsPath(path).drive
    return not climbs and str(parts) == path and path != "." and not re.search(r"[\\\0]", path)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"{what} is not valid")
