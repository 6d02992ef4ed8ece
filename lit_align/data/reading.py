"""The rows of a data module: settings, files read and tokenised, what identifies them."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeAlias

import lightning
import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from transformers import PreTrainedTokenizerBase

from lit_align.data.bad_rows import BadRows
from lit_align.data.loading import (
    RowLoader,
    describe,
    fingerprint,
    fingerprint_of_files,
    split_off,
    with_reference_logps,
)
from lit_align.data.schema import Row, TokenizedRow
from lit_align.data.shared_prefix import Layout
from lit_align.data.streaming_loader import (
    NEEDS_ALL_ROWS,
    Streams,
)
from lit_align.data.templates import chat_template_text
from lit_align.data.tokenize import RowTokenizer, Truncation
from lit_align.errors import DataError
from lit_align.language_model import load_tokenizer

Split: TypeAlias = Literal["train", "validation", "test", "predict"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test", "predict")
STAGE_SPLITS: dict[str | None, tuple[Split, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
    None: SPLITS,
}
Files: TypeAlias = str | list[str] | None


class ReadingDataModule(lightning.LightningDataModule):
    """Which rows a data module has, by split; `TextDataModule` makes batches of them."""

    row_type: ClassVar[type]
    default_layout: ClassVar[Layout] = "padded"

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase,
        train_file: Files = None,
        validation_file: Files = None,
        test_file: Files = None,
        predict_file: Files = None,
        *,
        format: str = "auto",
        chat_template: str | None = None,
        max_length: int = 1024,
        truncation: Truncation = "keep_start",
        batch_size: int = 4,
        eval_batch_size: int | None = None,
        max_rows: int | None = None,
        validation_fraction: float = 0.0,
        on_bad_row: Literal["error", "skip"] = "error",
        output_dir: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
        group_by_length: bool = True,
        streaming: bool = False,
        shuffle_buffer: int = 1000,
        layout: Layout | None = None,
        max_tokens: int | None = None,
    ) -> None:
        """Rows are read in `setup`, or with `streaming` while they are trained on.

        Args:
            tokenizer: local folder, hub id or alias of a model; or a tokenizer.
            train_file: .jsonl, .json, .parquet or .csv, folder of `datasets.save_to_disk`, or hub
                id (`name:split`); or a list of these.
            validation_file: likewise.
            test_file: likewise.
            predict_file: likewise.
            format: a format's name (see `lit_align.data.formats`); `auto` looks at the columns.
            chat_template: in place of the tokenizer's own: `transcript` (Human/Assistant, for base
                models), a file's path, or the Jinja text.
            max_length: most tokens of prompt and response together.
            truncation: of longer rows: keep_start | keep_end | error (they are bad rows).
            batch_size: rows per step and rank; a preference pair is one row.
            eval_batch_size: the same outside training; default `batch_size`.
            max_rows: use the first so many usable rows of each split.
            validation_fraction: without a validation file, split so much off the train rows; a
                prompt's rows stay together.
            on_bad_row: stop before training, or skip bad rows and write them to
                `rejected_rows.jsonl`.
            output_dir: folder of that file; default the trainer's `default_root_dir`.
            num_workers: processes that build batches.
            seed: of the shuffle and of the split.
            group_by_length: put rows of like length into a batch, which saves padding; a stream's
                stay as they come.
            streaming: for files larger than memory: read and tokenise rows as they come. A bad row
                stops the run when it is met (or is skipped: its batch is smaller); `max_rows`
                counts usable rows or not; needs `trainer.max_steps`, validation rows of their own
                and, of the reference policy, `reference: swap`.
            shuffle_buffer: of a stream: rows that the next one is drawn from; 0 keeps the order.
            layout: of batches: `padded`, every sequence a row of its own; or `shared_prefix`, all
                of a step's rows in one without padding, what a pair begins with computed once.
                None: the data module's own (`default_layout`).
            max_tokens: of the shared_prefix layout: fill each step up to so many tokens a rank, in
                place of `batch_size` rows; about equally many on every rank.
        """
        super().__init__()
        if batch_size < 1 or (eval_batch_size is not None and eval_batch_size < 1):
            raise DataError("batch_size and eval_batch_size must be at least 1")
        if not 0 <= validation_fraction < 1:
            raise DataError(f"validation_fraction is {validation_fraction}, not in [0, 1)")
        if on_bad_row not in ("error", "skip"):
            raise DataError(f"on_bad_row is {on_bad_row!r}: error | skip")
        if shuffle_buffer < 0:
            raise DataError(f"shuffle_buffer is {shuffle_buffer}: at least 0")
        if layout not in (None, "padded", "shared_prefix"):
            raise DataError(f"layout is {layout!r}: padded | shared_prefix")
        self.layout: Layout = layout or self.default_layout
        if max_tokens is not None and (self.layout == "padded" or streaming or max_tokens < 1):
            raise DataError(
                f"max_tokens {max_tokens} is for layout: shared_prefix of rows that are not "
                "streamed; leave it out, and batch_size rows make up a step"
            )
        if streaming and validation_fraction:
            raise DataError(
                "validation_fraction splits rows that are all there, and streaming has never more "
                "than a few: give validation_file"
            )
        files = (train_file, validation_file, test_file, predict_file)
        self.sources: dict[Split, Any] = {
            split: [file] if isinstance(file, str | Path) else file
            for split, file in zip(SPLITS, files, strict=True)
            if file
        }
        self.tokenizer_name = tokenizer
        self.chat_template = chat_template
        self.format = format
        self.max_length = max_length
        self.truncation: Truncation = truncation
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.max_rows = max_rows
        self.validation_fraction = validation_fraction
        self.on_bad_row = on_bad_row
        self.output_dir = output_dir
        self.num_workers = num_workers
        self.seed = seed
        self.group_by_length = group_by_length
        self.streaming = streaming
        self.shuffle_buffer = shuffle_buffer
        self.max_tokens = max_tokens
        self.bad_rows = BadRows()
        self._typed_rows: Mapping[Split, Sequence[Row]] = {}
        self._rows: dict[Split, list[TokenizedRow]] = {}
        self._streams = Streams()
        self._resume_from: dict[str, int] | None = None

    @classmethod
    def from_rows(
        cls,
        tokenizer: str | PreTrainedTokenizerBase,
        rows: Mapping[Split, Sequence[Row]],
        **settings: Any,
    ) -> Self:
        """A data module over typed rows of this objective, {split: rows}, instead of files."""
        module = cls(tokenizer, **settings)
        module._typed_rows = dict(rows)
        return module

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with the chat template that was asked for."""
        tokenizer = self.tokenizer_name
        if isinstance(tokenizer, str | Path):
            tokenizer = load_tokenizer(tokenizer)
        if self.chat_template is not None:
            tokenizer = copy.copy(tokenizer)  # the caller's keeps its own template
            tokenizer.chat_template = chat_template_text(self.chat_template)
        return tokenizer

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise the rows that the stage needs, unless that is done already.

        Raises:
            DataError: bad rows (all of the stage's together), or a split without a usable row.
        """
        loader = self._row_loader()
        if self.streaming:
            if self._typed_rows:
                raise DataError("streaming reads files; these rows are in memory: leave it out")
            for split in self._missing_splits(stage):
                if split in self.sources:
                    self._streams.open(split, self.sources[split])
            return
        known_bad = len(self.bad_rows)
        loaded = {}
        for split in self._missing_splits(stage):
            if split in self._typed_rows:
                name = f"{split} rows"
                loaded[split] = loader.from_rows(self._typed_rows[split], name, self.bad_rows)
            elif split in self.sources:
                loaded[split] = loader.from_files(self.sources[split], self.bad_rows)
        if len(self.bad_rows) > known_bad:
            self._handle_bad_rows()
        if "train" in loaded and "validation" not in loaded and self.validation_fraction:
            loaded["train"], loaded["validation"] = split_off(
                loaded["train"], self.validation_fraction, self.seed
            )
        for split, rows in loaded.items():
            if not rows:
                raise DataError(f"the {split} split has no usable row")
            rank_zero_info(f"{split}: {describe(rows)}")
        self._rows.update(loaded)

    def _row_loader(self) -> RowLoader:
        return RowLoader(self.row_type, self.row_tokenizer(), self.format, self.max_rows)

    def row_tokenizer(self) -> RowTokenizer:
        """How this module turns a typed row into tokens."""
        return RowTokenizer(self.tokenizer, self.max_length, self.truncation)

    @property
    def train_rows(self) -> list[TokenizedRow]:
        """Rows of the train split, after `setup`."""
        return self.rows("train")

    def rows(self, split: Split) -> list[TokenizedRow]:
        """Rows of a split, after `setup`; row i has row id i."""
        if split in self._streams:
            raise DataError(f"the {split} rows {NEEDS_ALL_ROWS}")
        if split not in self._rows:
            raise DataError(f"there are no {split} rows: give {split}_file, and call setup first")
        return self._rows[split]

    def has_rows(self, split: Split) -> bool:
        """Whether `setup` found rows for a split."""
        return split in self._rows or split in self._streams

    def fingerprint(self, split: Split) -> str:
        """SHA-256 over the token ids of a split, or over what is known of a stream's files.

        For the cache of reference log-probs, and for masks that are made from the rows.
        """
        if split in self._streams:
            return fingerprint_of_files(self.sources[split])
        return fingerprint(self.rows(split))

    def reference_key(self, split: Split) -> dict[str, str]:
        """All that reference log-probs of a split depend on, the model aside.

        By name, so that a cache that does not fit can say what differs.
        """
        tokenizer = self.tokenizer
        vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
        template = json.dumps(tokenizer.chat_template)
        return {
            "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
            "chat_template": hashlib.sha256(template.encode()).hexdigest(),
            "truncation": f"{self.truncation} {self.max_length}",
            "layout": self.layout,
            "rows": self.fingerprint(split),
        }

    def with_rows(self, split: Split, row_ids: Sequence[int]) -> Self:
        """A copy in which a split has these of its rows alone, under the ids they have here."""
        other = copy.copy(self)
        rows = self.rows(split)
        other._rows = {split: [rows[i] for i in row_ids]}
        return other

    def attach_reference_logps(self, split: Split, logps: Sequence[Sequence[np.ndarray]]) -> None:
        """Let a split's batches carry `ref_per_token_logps`.

        Args:
            split: which.
            logps: for each row, in order, one (N,) array for each of its sequences.

        Raises:
            DataError: other numbers of rows, sequences or tokens than the split has.
        """
        try:
            self._rows[split] = with_reference_logps(self.rows(split), logps)
        except ValueError as error:
            raise DataError(f"reference log-probs do not fit the {split} rows") from error

    def _missing_splits(self, stage: str | None) -> list[Split]:
        """The splits to load; validation rows may have to be split off the train rows."""
        given = {**self.sources, **self._typed_rows}
        splits = set(STAGE_SPLITS[stage])
        if "validation" in splits and "validation" not in given and self.validation_fraction:
            splits.add("train")
        known = {*self._rows, *self._streams.sources}
        return [split for split in SPLITS if split in splits - known]

    def _handle_bad_rows(self) -> None:
        """Stop, or write them down and go on."""
        if self.on_bad_row == "error":
            self.bad_rows.raise_if_any()
        rank_zero_only(self.bad_rows.write)(self._folder)
        rank_zero_info(f"{self.bad_rows.report()}\nskipped; written to {self._folder}")

    @property
    def _folder(self) -> Path:
        """Where bad rows are written to."""
        trainer = self.trainer
        root = trainer.default_root_dir if trainer is not None else "."
        return Path(self.output_dir or root)
