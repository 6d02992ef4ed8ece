"""Reading rows: JSONL, JSON, Parquet, CSV, a saved `datasets` folder, or a hub id.

`datasets` and pyarrow are imported where they are needed: they hold 80 MiB, which a run on JSONL
files does without.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_align.data.bad_rows import BadRowError, BadRows
from lit_align.errors import DataError
from lit_align.language_model import UNUSABLE
from lit_align.strict_json import MAX_DEPTH, check_depth, read_json_file, unique_names

if TYPE_CHECKING:
    import datasets

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_rows(
    source: str | Path, bad_rows: BadRows, *, streaming: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number counted from 1, values) of each row; unreadable ones go to `bad_rows`.

    Args:
        source: a `.jsonl`, `.json` (one list), `.parquet` or `.csv` file, a folder written by
            `save_to_disk`, or a hub id such as `trl-lib/ultrafeedback_binarized`. The last two take
            a split after a colon: `trl-lib/ultrafeedback_binarized:test[:100]`; default `train`.
            The network is used for hub ids alone.
        bad_rows: where rows are noted that cannot be read: not UTF-8, not JSON, not an object, not
            as many cells as the header.
        streaming: read a data set of the hub as it comes, without keeping it on disk. (Files are
            always read as they come, `.json` excepted; saved folders are mapped from disk.)

    Raises:
        DataError: nothing is there, a file of an unknown kind, or one that is damaged as a whole.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix not in READERS:
            raise DataError(f"{path}: the name must end in {', '.join(READERS)}")
        return READERS[path.suffix](path, bad_rows)
    return enumerate(_load_dataset(str(source), streaming), 1)


def _read_jsonl(path: Path, bad_rows: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    # Only '\n' ends a line: U+2028 and the like may stand inside a JSON string.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            if not line.strip():
                continue
            try:
                yield number, _object(_parse(line))
            except BadRowError as error:
                bad_rows.add(str(path), number, error, line.decode("utf-8", "backslashreplace"))


def _read_json(path: Path, bad_rows: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        values = _parse(path.read_bytes().removeprefix(BYTE_ORDER_MARK))
    except BadRowError as error:
        raise DataError(f"{path}: {error}") from error
    if not isinstance(values, list):
        raise DataError(f"{path}: expected a list of rows, found {type(values).__name__}")
    for number, value in enumerate(values, 1):
        try:
            yield number, _object(value)
        except BadRowError as error:
            bad_rows.add(str(path), number, error, value)


def _parse(text: bytes) -> Any:
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique_names)
        if text.count(b"[") + text.count(b"{") > MAX_DEPTH:
            check_depth(value)
        return value
    except UnicodeDecodeError as error:
        raise BadRowError("not UTF-8", f"byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise BadRowError("not JSON", str(error)) from error


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRowError("not a JSON object", type(value).__name__)
    return value


def _load_dataset(source: str, streaming: bool) -> datasets.IterableDataset:
    """A saved folder, or a data set of the hub."""
    import datasets

    name, _, split = source.partition(":")
    if Path(name).is_dir():
        loaded = _load_folder(Path(name))
        if isinstance(loaded, datasets.DatasetDict):
            split = split or "train"
            if split not in loaded:
                raise DataError(f"{name}: no split {split!r}; there are {', '.join(loaded)}")
            loaded = loaded[split]
        return _undecoded(loaded.to_iterable_dataset())
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or Path(name).suffix:
        raise DataError(f"{source}: no such file or folder")
    try:
        options = {"streaming": True} if streaming else {}
        loaded = datasets.load_dataset(name, split=split or "train", **options)
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: neither here nor readable from the hub: {error}") from error
    return _undecoded(loaded if streaming else loaded.to_iterable_dataset())


def _undecoded(rows: datasets.IterableDataset) -> datasets.IterableDataset:
    """The rows, none of which opens what it names: images and sounds are paths and addresses."""
    return rows.decode(False) if rows.features else rows


def _load_folder(folder: Path) -> datasets.Dataset | datasets.DatasetDict:
    import datasets
    import pyarrow

    try:
        _check_names(folder)
        loaded = datasets.load_from_disk(str(folder))
        for part in loaded.values() if isinstance(loaded, datasets.DatasetDict) else [loaded]:
            # It is mapped, and Arrow takes offsets as they are: one that leads out would be read.
            part.data.validate(full=True)
    except (*UNUSABLE, pyarrow.ArrowException) as error:
        raise DataError(f"{folder}: not a folder written by save_to_disk: {error}") from error
    return loaded


def _check_names(folder: Path) -> None:
    """Raise DataError where a saved folder names files outside it: `datasets` would read them."""
    for path in sorted([*folder.glob("state.json"), *folder.glob("*/state.json")]):
        for file in read_json_file(path)["_data_files"]:
            if Path(name := file["filename"]).name != name:
                raise DataError(f"{path} names {name!r:.200}, which leads out of its folder")
    path = folder / "dataset_dict.json"
    for name in read_json_file(path)["splits"] if path.is_file() else ():
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise DataError(f"{path} names {name!r:.200}, which is no folder in it")


def _read_parquet(path: Path, bad_rows: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    from lit_align.data.tables import read_parquet

    return read_parquet(path, bad_rows)


def _read_csv(path: Path, bad_rows: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    from lit_align.data.tables import read_csv

    return read_csv(path, bad_rows)


READERS: dict[str, Callable[[Path, BadRows], Iterator[tuple[int, dict[str, Any]]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
