"""LightningDataModules: files (or rows) in, `PackedBatch`es out."""

from __future__ import annotations

from typing import Any

from lit_align.data.bad_rows import BadRow
from lit_align.data.dataloader import ResumableDataLoader, make_dataloader
from lit_align.data.reading import ReadingDataModule, Split
from lit_align.data.sampler import BatchSampler
from lit_align.data.schema import PreferenceRow, SFTRow, UnlearningRow
from lit_align.data.shared_prefix import packed_lengths
from lit_align.data.streaming import StreamedRows
from lit_align.data.streaming_loader import (
    StreamingLoader,
    check_number_of_steps,
    count_batch,
)
from lit_align.data.token_budget import TokenBudgetSampler
from lit_align.data.tokenize import RowTokenizer, TrainOn
from lit_align.errors import DataError

MOST_BATCHES = 2**53  # of an epoch


class TextDataModule(ReadingDataModule):
    """What the data modules of all objectives share; use one of its subclasses."""

    def train_dataloader(self) -> Any:
        """Shuffled anew each epoch; of a resumed epoch, the batches that are left.

        Raises:
            DataError: a stream without a number of steps.
        """
        if self.streaming:
            check_number_of_steps(self.trainer)
        loader = self.dataloader("train", self.batch_size, shuffle=True)
        if self._resume_from is not None:
            loader.load_state_dict(self._resume_from)
            self._resume_from = None
        return loader

    def state_dict(self) -> dict[str, Any]:
        """The place within the epoch, for Lightning's checkpoint.

        (The trainer restores a loader's own state too late where something asked it for the number
        of steps before.)
        """
        loader = self.trainer.train_dataloader if self.trainer is not None else None
        if isinstance(loader, ResumableDataLoader | StreamingLoader):
            return loader.state_dict()
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the train loader go on from there, the next one where there is none yet.

        Raises:
            DataError: the checkpoint's place in the data is none.
        """
        for name in ("num_batches", "epoch") if self.streaming else ("num_batches",):
            count = state_dict.get(name) if isinstance(state_dict, dict) else None
            if type(count) is not int or not 0 <= count < MOST_BATCHES:
                raise DataError(f"the checkpoint's place in the data is none: {name} {count!r:.40}")
        self._streams.resumed = True
        loader = self.trainer.train_dataloader if self.trainer is not None else None
        if isinstance(loader, ResumableDataLoader | StreamingLoader):
            loader.load_state_dict(state_dict)  # ModelParallelStrategy restores late
        else:
            self._resume_from = state_dict

    def val_dataloader(self) -> Any:
        """Longest rows first; no loader where there are no validation rows."""
        if not self.has_rows("validation"):
            return []
        return self.dataloader("validation", self.eval_batch_size)

    def test_dataloader(self) -> Any:
        """Longest rows first."""
        return self.dataloader("test", self.eval_batch_size)

    def predict_dataloader(self) -> Any:
        """In the order of the file."""
        return self.dataloader("predict", self.eval_batch_size, group_by_length=False)

    def dataloader(
        self,
        split: Split,
        batch_size: int,
        *,
        shuffle: bool = False,
        group_by_length: bool | None = None,
    ) -> ResumableDataLoader | StreamingLoader:
        """Batches of a split for this rank; see `BatchSampler` for how they are made up.

        With `max_tokens` they are made up as `TokenBudgetSampler` says, whatever the batch size.
        Those of a stream are explained in `lit_align.data.streaming`.
        """
        if split in self._streams:
            return self._streaming_loader(split, batch_size, shuffle)
        rows = self.rows(split)
        settings: dict[str, Any] = {
            "shuffle": shuffle,
            "group_by_length": self.group_by_length if group_by_length is None else group_by_length,
            "seed": self.seed,
            **self._ranks(),
        }
        if self.max_tokens is None:
            sampler = BatchSampler([row.num_tokens for row in rows], batch_size, **settings)
        else:
            lengths = packed_lengths(rows, self.max_tokens, split)
            sampler = TokenBudgetSampler(lengths, self.max_tokens, **settings)
        return make_dataloader(rows, sampler, self._pad_id, self.num_workers, self.layout)

    def _streaming_loader(self, split: Split, batch_size: int, shuffle: bool) -> StreamingLoader:
        rows = StreamedRows(
            self._row_loader(),
            self.sources[split],
            batch_size,
            self._pad_id,
            shuffle_buffer=self.shuffle_buffer if shuffle else 0,
            seed=self.seed,
            layout=self.layout,
            **self._ranks(),
        )
        return StreamingLoader(rows, self.num_workers, self._epoch, self._take_bad_rows)

    def _ranks(self) -> dict[str, int]:
        """num_replicas and rank, where there are more than one."""
        return getattr(getattr(self.trainer, "strategy", None), "distributed_sampler_kwargs", {})

    @property
    def _pad_id(self) -> int:
        tokenizer: Any = self.tokenizer
        padding = tokenizer.pad_token_id
        return tokenizer.eos_token_id if padding is None else padding

    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer is not None else 0

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Count the batches of a stream that were trained on."""
        count_batch(self.trainer)
        return batch

    def _take_bad_rows(self, met: list[BadRow]) -> None:
        rank = self._ranks().get("rank", 0)
        skip = self.on_bad_row == "skip"
        self._streams.take_bad_rows(met, self._folder, rank, skip=skip)


class PreferenceDataModule(TextDataModule):
    """Preference pairs, for DPO: two sequences a row, chosen and rejected."""

    row_type = PreferenceRow
    default_layout = "shared_prefix"


class SFTDataModule(TextDataModule):
    """Instruction rows, for supervised fine-tuning."""

    row_type = SFTRow

    def __init__(self, *args: Any, train_on: TrainOn = "last", **kwargs: Any) -> None:
        """Arguments of `TextDataModule`, and one more.

        Args:
            *args: see `TextDataModule`.
            train_on: of a conversation, the last assistant turn (`last`) or every one
                (`all_assistant`; tokens in between get weight 0).
            **kwargs: see `TextDataModule`.
        """
        super().__init__(*args, **kwargs)
        if train_on not in ("last", "all_assistant"):
            raise DataError(f"train_on is {train_on!r}: last | all_assistant")
        self.train_on: TrainOn = train_on

    def row_tokenizer(self) -> RowTokenizer:
        """How this module turns a typed row into tokens."""
        return RowTokenizer(self.tokenizer, self.max_length, self.truncation, self.train_on)


class UnlearningDataModule(TextDataModule):
    """Responses to forget (REJECTED, with token weights) and good ones to retain (CHOSEN)."""

    row_type = UnlearningRow
