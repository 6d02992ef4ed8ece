"""The one batch type of every objective."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100
CHOSEN = 0
REJECTED = 1


class PackedBatch:
    """R rows of T tokens that hold S sequences with N targets; logits are needed for targets alone.

    A preference pair is two sequences that stand side by side: 2i chosen, 2i + 1 rejected. In the
    unlearning batch wrong responses are `REJECTED` and the retained good ones `CHOSEN`. In
    supervised fine-tuning all are `CHOSEN`. Targets are ordered by sequence, then by position.

    Not a dataclass on purpose: under bf16-true Lightning would look into one and cast its token
    weights and reference log-probs.

    Attributes:
        input_ids: (R, T) int64 token ids.
        position_ids: (R, T) int64.
        attention_mask: (R, T) int64, 1 where a token is real.
        hidden_index: (N,) int64, into the (R·T) hidden states: the one that predicts target n.
        target_ids: (N,) int64 token ids to be predicted.
        sequence_index: (N,) int64 in [0, S): the sequence that target n belongs to.
        token_weights: (N,) fp32.
        sequence_roles: (S,) int64, CHOSEN or REJECTED.
        row_ids: (S,) int64: index of the sequence's row in its dataset; -1 marks a filler (see
            `BatchSampler`), whose token weights are 0 and which must not count anywhere.
        ref_per_token_logps: (N,) fp32 log-probs of the reference policy, or None.
        target_offsets: S + 1 numbers on the host: sequence s has targets
            [target_offsets[s], target_offsets[s + 1]).
        documents: None in the padded layout. In the shared_prefix layout R is 1 and nothing is
            padded: the row is one document after another, each given by its lengths (prefix,
            branch, ...). A branch attends to its prefix and itself; positions begin at 0 in each
            document, and each branch's go on from the prefix's end.
    """

    def __init__(
        self,
        *,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        hidden_index: Tensor,
        target_ids: Tensor,
        sequence_index: Tensor,
        token_weights: Tensor,
        sequence_roles: Tensor,
        row_ids: Tensor,
        ref_per_token_logps: Tensor | None = None,
        target_offsets: list[int] | None = None,
        documents: tuple[tuple[int, ...], ...] | None = None,
    ) -> None:
        self.input_ids = input_ids
        self.position_ids = position_ids
        self.attention_mask = attention_mask
        self.hidden_index = hidden_index
        self.target_ids = target_ids
        self.sequence_index = sequence_index
        self.token_weights = token_weights
        self.sequence_roles = sequence_roles
        self.row_ids = row_ids
        self.ref_per_token_logps = ref_per_token_logps
        if target_offsets is None:
            counts = torch.bincount(sequence_index, minlength=sequence_roles.numel())
            target_offsets = [0, *counts.cumsum(0).tolist()]
        self.target_offsets = target_offsets
        self.documents = documents

    @property
    def num_sequences(self) -> int:
        """S."""
        return self.sequence_roles.numel()

    @property
    def num_tokens(self) -> int:
        """Real tokens in the batch: no padding, and nothing of a filler, which stands alone."""
        return int(self.attention_mask.sum()) if bool((self.row_ids >= 0).any()) else 0

    def sequences_of_targets(self, start: int, stop: int, together: int = 1) -> PackedBatch:
        """The sequences that targets [start, stop) make up, as what objectives read of a batch.

        Its rows of tokens stay whole. Units of `together` sequences (pairs: 2) are not divided, and
        one without targets goes with the unit before it.
        """
        offsets, units = self.target_offsets, self.target_offsets[::together]
        first = 0 if start == 0 else together * (bisect_right(units, start) - 1)
        last = together * (bisect_right(units, stop) - 1)
        at, sequences = slice(start, stop), slice(first, last)
        return PackedBatch(
            input_ids=self.input_ids,
            position_ids=self.position_ids,
            attention_mask=self.attention_mask,
            hidden_index=self.hidden_index[at],
            target_ids=self.target_ids[at],
            sequence_index=self.sequence_index[at] - first,
            token_weights=self.token_weights[at],
            sequence_roles=self.sequence_roles[sequences],
            row_ids=self.row_ids[sequences],
            ref_per_token_logps=(
                None if self.ref_per_token_logps is None else self.ref_per_token_logps[at]
            ),
            target_offsets=[offset - start for offset in offsets[first : last + 1]],
            documents=self.documents,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The batch on another device (Lightning's `move_data_to_device` calls this)."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The batch in pinned memory (the DataLoader calls this)."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> PackedBatch:
        moved: dict[str, Any] = {
            name: function(value) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return PackedBatch(**moved)
