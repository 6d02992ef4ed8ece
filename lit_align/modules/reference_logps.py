"""Log-probs of the reference policy for every row of a split: computed once, kept if asked."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

from lit_align.batch import PackedBatch
from lit_align.errors import TrainingError
from lit_align.files import write_atomically
from lit_align.modules.forward import per_token_logps

RowLogps = list[list[np.ndarray]]  # row → sequence → (N,) fp32


@torch.no_grad()
def compute(model: Any, batches: Iterable[PackedBatch], num_rows: int, precision: Any) -> RowLogps:
    """Per-token log-probs of every row's sequences under `model`, gathered from all ranks.

    Args:
        model: the reference, unrestricted or holding base values.
        batches: this rank's share of the rows; filler rows (row id −1) are left out.
        num_rows: rows of the split.
        precision: Lightning's precision plugin, so that autocast is as in training.
    """
    device = next(model.parameters()).device
    mine: dict[int, list[np.ndarray]] = {}
    for batch in tqdm(batches, desc="reference log-probs", leave=False):
        batch = batch.to(device)
        with precision.forward_context():
            logps = per_token_logps(model, batch).float().cpu().numpy()
        sequence_index = batch.sequence_index.cpu().numpy()
        for sequence, row in enumerate(batch.row_ids.tolist()):
            if row >= 0:
                mine.setdefault(row, []).append(logps[sequence_index == sequence])
    found = dict(pair for part in _gathered(mine) for pair in part.items())
    if sorted(found) != list(range(num_rows)):
        raise TrainingError(f"reference log-probs cover {len(found)} of {num_rows} rows")
    return [found[row] for row in range(num_rows)]


def _gathered(mine: Any) -> list[Any]:
    if not torch.distributed.is_initialized():
        return [mine]
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, mine)
    return parts


def write(path: Path, rows: RowLogps, key: dict[str, Any]) -> None:
    """Write a split's log-probs (fp32 safetensors) with the key they belong to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = [values for row in rows for values in row]
    tensors: dict[str, np.ndarray] = {
        "logps": np.concatenate(flat).astype(np.float32),
        "sequence_lengths": np.array([len(values) for values in flat], np.int64),
        "row_sequences": np.array([len(row) for row in rows], np.int64),
    }
    write_atomically(path, save(tensors, {"key": json.dumps(key, sort_keys=True)}))
    rank_zero_info(f"reference log-probs of {len(rows)} rows kept in {path}")


def read(path: Path, key: dict[str, Any]) -> RowLogps:
    """Read what `write` wrote, for the same key.

    Raises:
        TrainingError: the file is damaged, or its key differs; the message says in what.
    """
    try:
        with safe_open(path, framework="np") as file:
            stored = json.loads((file.metadata() or {}).get("key", "{}"))
            logps, lengths, counts = (
                file.get_tensor(n) for n in ("logps", "sequence_lengths", "row_sequences")
            )
    except (SafetensorError, OSError, ValueError) as error:
        raise TrainingError(f"{path}: not a file of reference log-probs: {error}") from error
    differing = sorted(k for k in key.keys() | stored.keys() if key.get(k) != stored.get(k))
    if differing:
        what = ", ".join(f"{k} ({stored.get(k)} there, {key.get(k)} here)" for k in differing)
        raise TrainingError(
            f"{path} holds reference log-probs of another run: {what}; remove it or name another "
            "reference_cache"
        )
    if min(lengths.min(initial=0), counts.min(initial=0)) < 0 or (
        lengths.sum() != len(logps) or counts.sum() != len(lengths)
    ):
        raise TrainingError(f"{path}: damaged: its lengths do not add up; remove it")
    sequences = np.split(logps, np.cumsum(lengths)[:-1])
    bounds = np.concatenate([[0], np.cumsum(counts)])
    return [list(sequences[a:b]) for a, b in pairwise(bounds)]
