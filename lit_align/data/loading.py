"""Sources → tokenised rows, with every bad row accounted for."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from tqdm.auto import tqdm

from lit_align.data.bad_rows import BadRowError, BadRows
from lit_align.data.files import read_rows
from lit_align.data.formats import FORMATS, parse_row
from lit_align.data.schema import PreferenceRow, Row, TokenizedRow
from lit_align.data.tokenize import RowTokenizer
from lit_align.data.validate import check_row
from lit_align.errors import DataError


@dataclasses.dataclass(frozen=True)
class RowLoader:
    """Reads, checks and tokenises the rows of one objective.

    Attributes:
        row_type: PreferenceRow, SFTRow or UnlearningRow.
        tokenize: how rows become tokens.
        format: a name from `formats`, or `auto`.
        max_rows: stop after so many usable rows.
    """

    row_type: type[Row]  # type: ignore[valid-type]
    tokenize: RowTokenizer
    format: str = "auto"
    max_rows: int | None = None

    def __post_init__(self) -> None:
        names = ["auto", *(candidate.name for candidate in FORMATS[self.row_type])]
        if self.format not in names:
            raise DataError(f"format is {self.format!r}: {' | '.join(names)}")

    def from_files(self, sources: Sequence[str | Path], bad_rows: BadRows) -> list[TokenizedRow]:
        """The usable rows of some files, in order; the others go to `bad_rows`."""

        def numbered() -> Iterator[tuple[str, int, Any]]:
            for source in sources:
                for number, columns in read_rows(source, bad_rows):
                    yield str(source), number, columns

        return self._load(numbered(), bad_rows)

    def from_rows(self, rows: Sequence[Row], name: str, bad_rows: BadRows) -> list[TokenizedRow]:
        """The usable ones of typed rows; `name` stands for the file in messages."""
        return self._load(((name, i, row) for i, row in enumerate(rows, 1)), bad_rows)

    def _load(self, rows: Iterable[tuple[str, int, Any]], bad_rows: BadRows) -> list[TokenizedRow]:
        tokenized: list[TokenizedRow] = []
        quiet = rank_zero_only.rank != 0  # type: ignore[attr-defined]
        for name, number, value in tqdm(rows, "tokenising", disable=quiet, delay=2, leave=False):
            try:
                tokenized.append(self.tokenized(value, len(tokenized)))
            except BadRowError as error:
                as_dict = value if isinstance(value, dict) else dataclasses.asdict(value)
                bad_rows.add(name, number, error, as_dict)
            if len(tokenized) == self.max_rows:
                break
        return tokenized

    def tokenized(self, value: Any, row_id: int) -> TokenizedRow:
        """Parse (unless it is a typed row), check, tokenise.

        Raises:
            BadRowError: the row cannot be used.
        """
        row = value
        if isinstance(value, dict):
            row = parse_row(value, FORMATS[self.row_type], self.format)
        check_row(row)
        responses = [row.chosen, row.rejected] if isinstance(row, PreferenceRow) else [row.response]
        for content in [row.prompt, *responses]:
            if found := self.tokenize.encoder.special_tokens_in(content):
                raise BadRowError("special token as text", found[0])
        return self.tokenize(row, row_id)


def describe(rows: Sequence[TokenizedRow]) -> str:
    """Counts for the log: rows, tokens, targets, merged boundaries, truncated sequences."""
    sequences = [sequence for row in rows for sequence in row.sequences]
    counts = {
        "rows": len(rows),
        "tokens": sum(sequence.num_tokens for sequence in sequences),
        "targets": sum(len(sequence.response_ids) for sequence in sequences),
        "longest": max((sequence.num_tokens for sequence in sequences), default=0),
        "truncated": sum(sequence.truncated for sequence in sequences),
        "merged boundaries": sum(sequence.merged_boundary for sequence in sequences),
    }
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def split_off(
    rows: Sequence[TokenizedRow], fraction: float, seed: int
) -> tuple[list[TokenizedRow], list[TokenizedRow]]:
    """(the larger part, about `fraction` of the rows), both numbered anew.

    Rows of one prompt stay together, so that no prompt is in both parts.
    """
    by_prompt: dict[bytes, list[TokenizedRow]] = {}
    for row in rows:
        by_prompt.setdefault(row.sequences[0].prompt_ids.tobytes(), []).append(row)
    groups = list(by_prompt.values())
    wanted = round(fraction * len(rows))
    held_out: set[int] = set()
    for index in np.random.default_rng(seed).permutation(len(groups)):
        if len(held_out) >= wanted:
            break
        held_out.update(row.row_id for row in groups[index])
    kept = [row for row in rows if row.row_id not in held_out]
    taken = [row for row in rows if row.row_id in held_out]
    return _renumbered(kept), _renumbered(taken)


def fingerprint(rows: Sequence[TokenizedRow]) -> str:
    """SHA-256 (hex) over the rows' token ids, boundaries, roles and order; weights do not count."""
    digest = hashlib.sha256()
    for row in rows:
        for sequence in row.sequences:
            header = [len(sequence.prompt_ids), len(sequence.response_ids), sequence.role]
            digest.update(np.array(header, "<i8").tobytes())
            digest.update(sequence.prompt_ids.astype("<i4").tobytes())
            digest.update(sequence.response_ids.astype("<i4").tobytes())
        digest.update(b"row")
    return digest.hexdigest()


def fingerprint_of_files(sources: Sequence[str | Path]) -> str:
    """SHA-256 (hex) over names, sizes and times of a stream's files: its rows are not held."""
    digest = hashlib.sha256()
    for source in sources:
        path = Path(source)
        stat = path.stat() if path.is_file() else None
        digest.update(repr((str(source), stat and (stat.st_size, stat.st_mtime_ns))).encode())
    return digest.hexdigest()


def with_reference_logps(
    rows: Sequence[TokenizedRow], logps: Sequence[Sequence[np.ndarray]]
) -> list[TokenizedRow]:
    """Rows whose sequences carry reference log-probs: one (N,) array a sequence.

    Raises:
        ValueError: other numbers of rows, sequences or tokens.
    """
    shapes = [[len(sequence.response_ids) for sequence in row.sequences] for row in rows]
    if shapes != [[len(values) for values in row] for row in logps]:
        raise ValueError("reference log-probs of another shape")
    replaced = []
    for row, values in zip(rows, logps, strict=True):
        sequences = (
            dataclasses.replace(sequence, ref_per_token_logps=per_token)
            for sequence, per_token in zip(row.sequences, values, strict=True)
        )
        replaced.append(dataclasses.replace(row, sequences=tuple(sequences)))
    return replaced


def _renumbered(rows: Sequence[TokenizedRow]) -> list[TokenizedRow]:
    return [dataclasses.replace(row, row_id=i) for i, row in enumerate(rows)]
