"""Reference log-probs on disk: files of sequences, each known by the digest of its token ids.

Every file ("part") is written once, whole or not at all, under a name that no other process uses,
and says itself which settings it belongs to. So there is nothing that two runs in one folder, or
the ranks of one, could overwrite, and nothing that a killed process could leave half done; and
whatever rows a later run has, in whatever order and split, it finds those that are there.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Container, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lit_align.errors import TrainingError
from lit_align.files import write_atomically
from lit_align.strict_json import parse_json

Logps: TypeAlias = dict[bytes, np.ndarray]  # digest of a sequence → (N,) fp32, in nats
FORMAT = "lit-align reference log-probs 1"
DIGEST_BYTES = 32
SHOWN_DIFFERENCES = 8
# name → (dtype in the file, number of dimensions)
TENSORS = {"logps": ("F32", 1), "lengths": ("I64", 1), "digests": ("U8", 2)}
# Of a token that is all but certain, log-sum-exp's rounding may leave a little more than 0.
HIGHEST_LOGP = 1e-3


def sequence_digest(prompt_ids: np.ndarray, response_ids: np.ndarray) -> bytes:
    """SHA-256 of a sequence's token ids and of where its response begins: what a log-prob is of."""
    digest = hashlib.sha256(np.array([len(prompt_ids), len(response_ids)], "<i8").tobytes())
    digest.update(prompt_ids.astype("<i4").tobytes())
    digest.update(response_ids.astype("<i4").tobytes())
    return digest.digest()


def is_usable(logps: np.ndarray) -> bool:
    """Whether all are finite and no probability is above 1."""
    return bool(np.isfinite(logps).all()) and float(logps.max(initial=-1.0)) <= HIGHEST_LOGP


class ReferenceStore:
    """A folder of parts, all of one key."""

    def __init__(self, folder: str | Path, key: Mapping[str, Any]) -> None:
        """Nothing is read or written yet.

        Args:
            folder: is made where it is missing; all ranks must see the same one.
            key: all that the log-probs depend on, the sequences aside: name → value, as JSON.
        """
        self.folder = Path(folder)
        self.key = dict(key)

    def names(self) -> list[str]:
        """The parts that are there now, sorted.

        Raises:
            TrainingError: the folder cannot be made or read.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return sorted(p.name for p in self.folder.iterdir() if p.suffix == ".safetensors")
        except OSError as error:
            raise TrainingError(f"reference_cache {self.folder}: {error}") from error

    def write(self, logps: Logps) -> str:
        """Write a part of at least one sequence.

        Returns:
            Its name.

        Raises:
            TrainingError: it cannot be written.
        """
        digests = b"".join(logps)
        tensors: dict[str, np.ndarray] = {
            "logps": np.concatenate(list(logps.values())).astype(np.float32),
            "lengths": np.array([len(values) for values in logps.values()], np.int64),
            "digests": np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES),
        }
        key = json.dumps(self.key, sort_keys=True)
        metadata = {"format": FORMAT, "key": key, "checksum": _checksum(key, tensors)}
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        try:
            write_atomically(path, save(tensors, metadata))
        except OSError as error:
            raise TrainingError(f"reference_cache {path}: cannot be written: {error}") from error
        return path.name

    def read(self, name: str, wanted: Container[bytes]) -> Logps:
        """The sequences of a part that are wanted.

        Raises:
            TrainingError: the part is damaged, or belongs to other settings; says which.
        """
        path = self.folder / name
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                self._check_key(path, metadata)
                _check_shapes(path, file)
                tensors = {n: file.get_tensor(n) for n in TENSORS}
        except FileNotFoundError as error:
            raise TrainingError(
                f"{path} was there for another process and is not for this one: all ranks must see "
                "the same folder as reference_cache, and nobody may clear it meanwhile"
            ) from error
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(path, str(error)) from error
        _check_values(path, metadata, tensors)
        digests = tensors["digests"].tobytes()
        bounds = np.concatenate([[0], np.cumsum(tensors["lengths"])]).tolist()
        found = {}
        for i, (start, stop) in enumerate(pairwise(bounds)):
            digest = digests[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES]
            if digest in wanted:
                found[digest] = tensors["logps"][start:stop]
        return found

    def _check_key(self, path: Path, metadata: Mapping[str, str]) -> None:
        if metadata.get("format") != FORMAT:
            raise TrainingError(
                f"{path} is not one of the cache's files (its format is "
                f"{metadata.get('format')!r}, not {FORMAT!r}): name an empty folder, or none yet, "
                "as reference_cache"
            )
        try:
            theirs = parse_json(metadata.get("key", ""))
        except ValueError as error:
            raise _damaged(path, "its key is no JSON") from error
        if not isinstance(theirs, dict):
            raise _damaged(path, "its key is no JSON object")
        ours = json.loads(json.dumps(self.key))
        differing = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
        if differing:
            what = ", ".join(
                f"{_short(k)} ({_short(theirs.get(k))} there, {_short(ours.get(k))} here)"
                for k in differing[:SHOWN_DIFFERENCES]
            )
            raise TrainingError(
                f"reference_cache {path.parent} holds reference log-probs of another run: {what}; "
                f"name another folder, or remove this one to compute them anew (read: {path.name})"
            )


def _short(value: Any) -> str:
    text = "".join(c if c.isprintable() else " " for c in str(value))
    return text if len(text) <= 40 else text[:12] + "…"


def _check_shapes(path: Path, file: Any) -> None:
    """Names, dtypes and shapes, before anything is read."""
    if set(file.keys()) != TENSORS.keys():
        raise _damaged(path, f"it has the tensors {sorted(file.keys())}")
    shapes = {}
    for name, (dtype, dimensions) in TENSORS.items():
        piece = file.get_slice(name)
        shapes[name] = piece.get_shape()
        if piece.get_dtype() != dtype or len(shapes[name]) != dimensions:
            raise _damaged(path, f"{name} is {piece.get_dtype()} of shape {shapes[name]}")
    if shapes["digests"] != [*shapes["lengths"], DIGEST_BYTES]:
        raise _damaged(path, "as many digests of 32 bytes as lengths are not in it")


def _check_values(
    path: Path, metadata: Mapping[str, str], tensors: Mapping[str, np.ndarray]
) -> None:
    if metadata.get("checksum") != _checksum(metadata["key"], tensors):
        raise _damaged(path, "its checksum does not match")
    lengths, logps = tensors["lengths"], tensors["logps"]
    digests = tensors["digests"].view(f"V{DIGEST_BYTES}").ravel().tolist()
    if len(set(digests)) < len(digests):
        raise _damaged(path, "a digest is there twice")
    # Each on its own first: a sum of any numbers could overflow to the right one.
    in_range = lengths.min(initial=1) >= 1 and lengths.max(initial=0) <= len(logps)
    if not in_range or lengths.sum() != len(logps):
        raise _damaged(path, f"its lengths do not add up to its {len(logps)} log-probs")
    if not is_usable(logps):
        raise _damaged(path, "not all of it are log-probs: NaN, infinite or above 0")


def _checksum(key: str, tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(key.encode())
    for name in TENSORS:
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()


def _damaged(path: Path, why: str) -> TrainingError:
    return TrainingError(
        f"{path}: not usable as reference log-probs: {why}; remove the file, and what was in it "
        "will be computed again"
    )
