"""What a checkpoint of every module holds: the trainable entries, and whose they are."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lit_align.compact import load_trainable, trainable
from lit_align.compact.adapters import AdapterSettings, adapter_identity
from lit_align.compact.rank_allocation import (
    allocates_ranks,
    allocation_state,
    load_allocation_state,
)
from lit_align.errors import TrainingError
from lit_align.modules.logged import LoggedModule

CHECKPOINT_KEY = "lit_align"
RANKS = "rank_allocation"  # in it: what AdaLoRA's has learnt
PREFIX = "language_model."  # of the model's parameters in a module's state


class CheckpointedModule(LoggedModule):
    """Holds a language model, of which checkpoints keep what trains."""

    def __init__(self) -> None:
        super().__init__()
        self.language_model: PreTrainedModel | None = None
        self.delta_checksum: str | None = None  # of the delta that the run starts from

    @property
    def model(self) -> PreTrainedModel:
        """The language model, once it is loaded."""
        if self.language_model is None:
            raise TrainingError("the model is loaded in configure_model: call it first")
        return self.language_model

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The trainable entries alone; the base is named by its fingerprint."""
        return {PREFIX + name: p.detach() for name, p in trainable(self.model)}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load trainable entries and write them into the weights.

        Raises:
            TrainingError: names or shapes are not those of what trains here.
        """
        load_trainable(self.model, {n.removeprefix(PREFIX): t for n, t in state_dict.items()})
        return torch.nn.modules.module._IncompatibleKeys([], [])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the base, the mask, the delta and the adapters that the entries belong to."""
        done = self.throughput
        seen_tokens = done.seen_tokens + done.tokens_since_log(self.device)
        checkpoint[CHECKPOINT_KEY] = self._identity() | {"seen_tokens": seen_tokens}
        if allocates_ranks(self.model):
            checkpoint[CHECKPOINT_KEY][RANKS] = allocation_state(self.model)
        settings = checkpoint.get("hyper_parameters", {})
        if isinstance(settings.get("adapter"), AdapterSettings):  # not with `weights_only`
            settings["adapter"] = dataclasses.asdict(settings["adapter"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base, mask, delta or adapter.

        Raises:
            TrainingError: names both.
        """
        theirs, ours = checkpoint.get(CHECKPOINT_KEY, {}), self._identity()
        for what, value in ours.items():
            if theirs.get(what) != value:
                raise TrainingError(
                    f"the checkpoint has {what} {theirs.get(what)}, this run {value}: it belongs "
                    "to another run"
                )
        if allocates_ranks(self.model):
            load_allocation_state(self.model, theirs[RANKS])
        self.throughput.seen_tokens = int(theirs.get("seen_tokens", 0))
        self.logged_step = int(checkpoint["global_step"])

    def _identity(self) -> dict[str, Any]:
        return {
            "base_fingerprint": getattr(self.model, "base_fingerprint", None),
            "mask_digest": None if self.mask is None else self.mask.digest,
            "delta_checksum": self.delta_checksum,
            "adapter": adapter_identity(self.model),
        }


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A Lightning checkpoint, its tensors mapped from the file.

    Raises:
        TrainingError: the file is no checkpoint, or damaged.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        checkpoint["state_dict"], checkpoint["hyper_parameters"]
    except (
        OSError,
        RuntimeError,
        ValueError,
        LookupError,
        TypeError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        raise TrainingError(f"{path}: not a checkpoint, or damaged") from error
    return checkpoint
