"""Where a module's reference log-probs come from: a cache, base values swapped in, or nowhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel

from lit_align.batch import PackedBatch
from lit_align.compact.reference import holds_reference, reference_policy
from lit_align.errors import TrainingError
from lit_align.modules import reference_logps
from lit_align.modules.forward import per_token_logps
from lit_align.modules.optimized import OptimizedModule
from lit_align.modules.reference_store import ReferenceStore

Reference = Literal["cache", "swap", "none"]
SPLITS = ("train", "validation", "test", "predict")


class ReferencedModule(OptimizedModule):
    """Gives the log-probs of the reference policy π_ref, the model before training.

    `reference: cache` has them computed once for all rows, `swap` at every step with base values in
    place of the trained ones. `none` is reference-free: log π_ref counts as 0 for every token (as
    `reference_free` in github.com/eric-mitchell/direct-preference-optimization, DPO's own code),
    so that the loss sees log π itself where it would see log π − log π_ref.
    """

    uses_reference: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        # split → its rows as this module left them, with their log-probs
        self._rows_served: dict[str, Any] = {}

    def load_base(self) -> PreTrainedModel:
        """The model before training, loaded from its files onto this rank's device."""
        raise NotImplementedError

    @property
    def reference_free(self) -> bool:
        """Whether log π_ref is 0 for every token."""
        return self.uses_reference and self.hparams["reference"] == "none"

    def reference_context(self) -> AbstractContextManager[None]:
        """Inside, the trained model is its own reference."""
        return reference_policy(self.model)

    def reference_per_token_logps(self, batch: PackedBatch) -> Tensor | None:
        """(N,) log-probs of the reference: from the batch, by swapping base values in, or zeros."""
        if not self.uses_reference:
            return batch.ref_per_token_logps
        if self.reference_free:
            return torch.zeros_like(batch.token_weights)
        if self.hparams["reference"] == "cache" and batch.ref_per_token_logps is not None:
            return batch.ref_per_token_logps
        with torch.no_grad(), self.reference_context():
            return per_token_logps(self.model, batch)

    def _attach_reference_logps(self, reference: reference_logps.Reference) -> None:
        """Let the rows of this run carry reference log-probs; those that do so already, are left.

        Args:
            reference: gives the reference inside a context.
        """
        if not self.uses_reference or self.hparams["reference"] != "cache":
            return
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "attach_reference_logps"):
            raise TrainingError(
                "reference: cache needs one of lit-align's data modules; use reference: swap"
            )
        plugin = self.trainer.precision_plugin
        for split in SPLITS:
            if data.has_rows(split) and self._rows_served.get(split) is not data.rows(split):
                store = self._reference_store(data, split)
                reference_logps.attach(data, split, reference, plugin, store)
                self._rows_served[split] = data.rows(split)

    def _reference_store(self, data: Any, split: str) -> ReferenceStore | None:
        folder = self.hparams["reference_cache"]
        if not folder:
            return None
        # The rows are no part of the key: each is known by its own tokens.
        key = {name: value for name, value in data.reference_key(split).items() if name != "rows"}
        adapter = getattr(self, "adapter", None)
        return ReferenceStore(
            folder,
            key
            | {
                "model": self.model.base_fingerprint,
                "delta": self.delta_checksum,
                "quantization": "none" if adapter is None else adapter.quantization,
                "precision": str(self.trainer.precision),
            },
        )

    @contextlib.contextmanager
    def _reference_again(self) -> Iterator[PreTrainedModel]:
        """The reference after training has begun: base values swapped in, or a second copy."""
        if not holds_reference(self.model):
            rank_zero_info("reference: cache met new rows: the base is loaded once more for them")
            yield self.load_base().eval()
            return
        training = self.model.training
        self.model.eval()
        try:
            with self.reference_context():
                yield self.model
        finally:
            self.model.train(training)


def check_reference(reference: str, reference_cache: str | None) -> None:
    """Refuse settings that do not go together.

    Raises:
        TrainingError: an unknown `reference`, or a folder for log-probs that nothing computes.
    """
    if reference not in get_args(Reference):
        raise TrainingError(
            f"reference {reference!r}: choose one of {', '.join(get_args(Reference))}"
        )
    if reference_cache and reference != "cache":
        raise TrainingError(
            f"reference_cache is the folder of reference: cache, and reference is {reference}: "
            "leave one of them out"
        )
