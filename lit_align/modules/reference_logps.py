"""Log-probs of the reference policy for every row of a split: what is not known is computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from tqdm.auto import tqdm

from lit_align.batch import PackedBatch
from lit_align.errors import TrainingError
from lit_align.modules.forward import per_token_logps
from lit_align.modules.reference_store import (
    Logps,
    ReferenceStore,
    is_usable,
    sequence_digest,
)

PART_SECONDS = 20.0  # of computing, that a killed process may lose
RowLogps: TypeAlias = list[list[np.ndarray]]  # row → sequence → (N,) fp32
Reference: TypeAlias = Callable[[], AbstractContextManager[Any]]


def attach(
    data: Any, split: str, reference: Reference, precision: Any, store: ReferenceStore | None
) -> None:
    """Let the rows of a split carry reference log-probs: those of the store, and the rest computed.

    A sequence is computed once, however many rows have it. Every rank must call this.

    Args:
        data: data module that has the rows.
        split: which.
        reference: gives the reference inside a context; called where something is missing.
        precision: Lightning's precision plugin, so that autocast is as in training.
        store: where they are kept, or None.

    Raises:
        TrainingError: the store is damaged or of other settings, or the reference gives no
            log-probs.
        DataError: the rows are streamed.
    """
    rows = data.rows(split)
    digests = [[sequence_digest(s.prompt_ids, s.response_ids) for s in r.sequences] for r in rows]
    wanted = {digest for row in digests for digest in row}
    # What the first rank sees, so that all have the same rows to compute.
    known = _read(store, _gathered(store.names())[0], wanted) if store else {}
    missing = _missing(digests, known)
    _report(split, len(rows), missing, store)
    if missing:
        subset = data.with_rows(split, missing)
        with reference() as model:
            batches = subset.dataloader(split, subset.eval_batch_size)
            bar = _progress(f"reference log-probs of {split}", subset.rows(split))
            computed, parts = compute(model, batches, subset.rows(split), precision, store, bar)
        known |= _exchange(store, computed, parts, wanted)
    data.attach_reference_logps(split, _by_row(rows, digests, known, store))


@torch.no_grad()
def compute(
    model: Any,
    batches: Iterable[PackedBatch],
    rows: Sequence[Any],
    precision: Any,
    store: ReferenceStore | None,
    progress: Any,
) -> tuple[Logps, list[str]]:
    """This rank's share, written every `PART_SECONDS` and when it ends, interrupted or not.

    Args:
        model: the reference.
        batches: of the rows; fillers (row id −1) are left out.
        rows: tokenised rows that the batches are made of.
        precision: Lightning's precision plugin.
        store: where parts go, or None.
        progress: tqdm's bar, in tokens.

    Returns:
        The log-probs where there is no store, and the names of the parts where there is one.
    """
    by_id = {row.row_id: row for row in rows}
    device = next(model.parameters()).device
    part: Logps = {}
    names: list[str] = []
    began = time.monotonic()
    try:
        for batch in batches:
            batch = batch.to(device)
            with precision.forward_context():
                logps = per_token_logps(model, batch).float().cpu().numpy()
            progress.update(_take(part, logps, batch, by_id))
            if store is not None and part and time.monotonic() - began >= PART_SECONDS:
                names.append(store.write(part))
                part, began = {}, time.monotonic()
    finally:
        progress.close()
        if store is not None and part:
            names.append(store.write(part))
            part = {}
    return part, names


def _take(part: Logps, logps: np.ndarray, batch: PackedBatch, by_id: dict[int, Any]) -> int:
    """Add a batch's log-probs to a part; how many tokens that was."""
    offsets, tokens = batch.target_offsets, 0
    seen: dict[int, int] = {}  # row → its sequences in the batch so far
    for i, row in enumerate(batch.row_ids.tolist()):
        if row < 0:
            continue
        sequence = by_id[row].sequences[seen.get(row, 0)]
        seen[row] = seen.get(row, 0) + 1
        values = logps[offsets[i] : offsets[i + 1]]
        if not is_usable(values):
            raise TrainingError(
                f"the reference's log-probs of row {row} are NaN, infinite or above 0: the model "
                "is damaged, or its numbers do not fit trainer.precision"
            )
        part[sequence_digest(sequence.prompt_ids, sequence.response_ids)] = values.copy()
        tokens += sequence.num_tokens
    return tokens


def _missing(digests: Sequence[Sequence[bytes]], known: Logps) -> list[int]:
    """Rows to compute, so that each sequence that is not known is in one of them."""
    covered, rows = set(known), []
    for row, of_row in enumerate(digests):
        if not covered.issuperset(of_row):
            rows.append(row)
            covered.update(of_row)
    return rows


def _exchange(
    store: ReferenceStore | None, computed: Logps, parts: list[str], wanted: set[bytes]
) -> Logps:
    """What all ranks computed, the same on each."""
    if store is None:
        return {d: values for of_rank in _gathered(computed) for d, values in of_rank.items()}
    return _read(store, [name for of_rank in _gathered(parts) for name in of_rank], wanted)


def _read(store: ReferenceStore, names: Iterable[str], wanted: set[bytes]) -> Logps:
    found: Logps = {}
    for name in names:
        found |= store.read(name, wanted)
    return found


def _by_row(
    rows: Sequence[Any],
    digests: Sequence[Sequence[bytes]],
    known: Logps,
    store: ReferenceStore | None,
) -> RowLogps:
    where = store.folder if store else "memory"
    for row, of_row in zip(rows, digests, strict=True):
        for sequence, digest in zip(row.sequences, of_row, strict=True):
            count, found = len(sequence.response_ids), len(known.get(digest, ()))
            if found != count:
                raise TrainingError(
                    f"row {row.row_id} has {count} targets in one sequence, and log-probs "
                    f"of the reference for {found} are in {where}: it is damaged; remove it"
                )
    return [[known[digest] for digest in of_row] for of_row in digests]


def _report(split: str, count: int, missing: list[int], store: ReferenceStore | None) -> None:
    if store is None:
        return
    text = f"reference log-probs of {split}: {count - len(missing)} of {count} rows "
    text += f"need no computing: {store.folder}"
    if missing and len(missing) < count:
        names = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
        text += f"; not there yet, or changed: {len(missing)} (rows {names})"
    rank_zero_info(text)


def _progress(what: str, rows: Sequence[Any]) -> Any:
    """A bar over this rank's share of the tokens: rows take time by their length."""
    parallel = torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if parallel else 0
    ranks = torch.distributed.get_world_size() if parallel else 1
    total = sum(s.num_tokens for row in rows for s in row.sequences) // ranks
    return tqdm(
        total=total, desc=what, unit="tok", unit_scale=True, disable=rank != 0, leave=False, delay=2
    )


def _gathered(mine: Any) -> list[Any]:
    """Every rank's, by rank."""
    if not torch.distributed.is_initialized():
        return [mine]
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, mine)
    return parts
