"""Writing and hashing files so that a killed process never leaves half of one behind."""

import errno
import hashlib
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO

from lit_align.errors import LitAlignError

LOCK_NAME = ".lock"
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` whole or not at all: temporary name, fsync, rename.

    Args:
        path: Where the file shall stand; its folder must exist.
        data: The file's bytes.
    """
    with atomic_file(path) as handle:
        handle.write(data)


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """An open file that stands at `path` once all is written and durable, or not at all."""
    temporary = partial_name(path, os.getpid())
    temporary.unlink(missing_ok=True)  # of a killed process, or a link that somebody left there
    try:
        with temporary.open("xb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)  # of a full disk the system names none
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_failure(error: BaseException | None) -> str | None:
    """What the system said where it could not write a file (a full disk); None: something else."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):
            number = int(found[1])  # of writers in Rust: safetensors, tokenizers
        if number in UNWRITABLE:
            name = getattr(error, "filename", None)
            return os.strerror(number) + (f": {name}" if name else "")
        error = error.__cause__ or error.__context__
    return None


def partial_name(path: Path, process: int) -> Path:
    """Where a process writes what shall stand at `path`, or puts what shall not any longer."""
    return path.with_name(f".{path.name}.{process}.partial")


def remove_partial_files(folder: Path, pattern: str = "*") -> None:
    """Remove what killed processes had begun to write to names of this pattern."""
    for leftover in folder.glob(f".{pattern}.partial"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable (Windows has no such call and needs none)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hex; read again only when size, time or inode has changed."""
    stat = path.stat()
    return _sha256(str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=4096)
def _sha256(path: str, size_bytes: int, mtime_ns: int, inode: int) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def locked_folder(folder: Path, error_type: type[LitAlignError]) -> Iterator[None]:
    """Hold a run's output folder for this process; the system lets go of it when that dies.

    Args:
        folder: It must exist.
        error_type: What to raise.

    Raises:
        LitAlignError: of that type: another run works in the folder; names its process and host.
            Or the lock is a link, which would have another file written.
    """
    path = folder / LOCK_NAME
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise error_type(f"{path} is no plain file, so no run of ours made it: remove it")
    with open(path, "a+", encoding="utf-8", opener=_open_no_link) as handle:
        try:
            _lock(handle)
        except OSError as error:
            handle.seek(0)
            owner = " on ".join(handle.read(300).split()) or "unknown"
            raise error_type(
                f"another run (process {owner}) works in {folder}: wait for it, or choose "
                "another output folder"
            ) from error
        handle.truncate(0)
        handle.write(f"{os.getpid()} {socket.gethostname()}\n")
        handle.flush()
        yield


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _lock(handle: IO[str]) -> None:
    """Lock an open file without waiting; OSError where somebody else holds it."""
    if sys.platform == "win32":
        import msvcrt

        handle.seek(1 << 20)  # past the text: Windows forbids others to read the locked bytes
        msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        handle.seek(0)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
