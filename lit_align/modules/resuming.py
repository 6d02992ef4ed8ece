"""What makes a resumed run end exactly like one that was never interrupted.

- A checkpoint begins at a step. One that is taken inside an accumulation window describes the
  window's beginning: nothing has moved since, so no gradient has to be kept, and its batches are
  simply gone through again.
- Its counters are written anew. Lightning's own say, after a checkpoint at an epoch's last batch,
  that the next epoch has not begun until it is over; with `max_steps` they count an epoch too
  many; and a validation that was due is left out.
- Random numbers (dropout's) are a function of the run's seed and the place, not of what else was
  drawn on the way: making an iterator draws, so does validation, and a resumed run does neither
  as often.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from lit_align.checkpoint_content import check_alike, is_count
from lit_align.errors import TrainingError

COUNTS = ("ready", "started", "processed", "completed")
BATCHES = "epoch_loop.batch_progress"
VALIDATION = "epoch_loop.val_loop.batch_progress"
OPTIMIZER = "epoch_loop.automatic_optimization.optim_progress"


def begin_at_step(checkpoint: dict[str, Any], trainer: Any) -> bool:
    """Set a checkpoint's place in the data to its last optimiser step.

    Returns:
        Whether the run was past it, inside an accumulation window.
    """
    loop = checkpoint["loops"]["fit_loop"]
    epochs, batches = loop["epoch_progress"], loop[BATCHES]["current"]
    epoch, ready = epochs["current"]["completed"], batches["ready"]
    between = epochs["total"]["completed"] == epochs["total"]["ready"]
    if ready == 0 or (between and trainer.fit_loop.done):
        return False  # before the first batch, or after the last
    if epochs["total"]["ready"] > epochs["total"]["started"]:
        epoch -= 1  # an epoch is about to start: the counters are still those of the one before
    stepped = loop[OPTIMIZER]["optimizer"]["step"]["current"]["completed"]  # in this epoch
    place = min(ready, stepped * trainer.accumulate_grad_batches)  # the last window may be shorter
    before = loop[BATCHES]["total"]["ready"] - ready
    last = place == ready and (
        loop[BATCHES]["is_last_batch"] or place == trainer.num_training_batches
    )
    due = _validation_is_due(trainer, place, before + place, place == ready)
    pending = due and place == ready == batches["processed"] == batches["completed"] + 1
    if last and not pending and not trainer.validating:
        # (Lightning does not see that a stream ended with the batch before.)
        streamed = trainer.num_training_batches == float("inf")
        is_final = epoch + 1 == trainer.max_epochs and not streamed
        _set_epoch_end(loop, epoch, place, before, is_final)
        due = is_final or _validation_is_due(trainer, 0, before + place, False)
    else:
        _set_batches(loop, place, before + place, last=last)
        _set(loop["epoch_progress"], (epoch + 1, epoch + 1, epoch, epoch))
    # One that has begun and done nothing is gone through from its beginning.
    _set(loop[VALIDATION], (1, 1, 0, 0) if pending else (0, 0, 0, 0))
    loop[VALIDATION]["is_last_batch"] = not pending
    # Lightning adds one where it finds validation due, before or after it.
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"] - due
    _set_loaders(checkpoint, trainer, epoch + last, 0 if last else place)
    return place < ready and not last


def _set_epoch_end(
    loop: dict[str, Any], epoch: int, place: int, before: int, is_final: bool
) -> None:
    """Before the next epoch; after the final one, before what is done when training ends."""
    if is_final:
        _set_batches(loop, place, before + place, last=True)
        for which in ("current", "total"):
            loop[BATCHES][which]["completed"] -= 1
        _set(loop["epoch_progress"], (epoch + 1, epoch + 1, epoch, epoch))
        return
    _set_batches(loop, 0, before + place, last=False)
    _set(loop["epoch_progress"], (epoch + 2, epoch + 1, epoch + 1, epoch + 1))
    for counted in loop[OPTIMIZER]["optimizer"].values():
        counted["current"] = dict.fromkeys(counted["current"], 0)


def _set_batches(loop: dict[str, Any], place: int, total: int, *, last: bool) -> None:
    loop[BATCHES]["current"] = dict.fromkeys(COUNTS, place)
    loop[BATCHES]["total"] = dict.fromkeys(COUNTS, total)
    loop[BATCHES]["is_last_batch"] = last


def _set(progress: dict[str, Any], counts: tuple[int, ...]) -> None:
    progress["current"] = dict(zip(COUNTS, counts, strict=True))
    progress["total"] = dict(zip(COUNTS, counts, strict=True))


def _validation_is_due(trainer: Any, place: int, total: int, is_here: bool) -> bool:
    """Whether Lightning validates after so many batches, here where the loop stands or before."""
    epoch_loop = trainer.fit_loop.epoch_loop
    if is_here:
        return bool(epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher))
    every = trainer.val_check_batch
    if every in (None, float("inf")) or not epoch_loop._should_check_val_epoch():
        return False
    return (total if trainer.check_val_every_n_epoch is None else place) % every == 0


def _set_loaders(checkpoint: dict[str, Any], trainer: Any, epoch: int, num_batches: int) -> None:
    place = {"epoch": epoch, "num_batches": num_batches}
    state, data = checkpoint["loops"]["fit_loop"]["state_dict"], type(trainer.datamodule)
    if data.__qualname__ in checkpoint:
        checkpoint[data.__qualname__] = _moved(checkpoint[data.__qualname__], place)
    if "combined_loader" in state:
        state["combined_loader"] = [_moved(each, place) for each in state["combined_loader"]]


def check_place(checkpoint: dict[str, Any], trainer: Any) -> None:
    """Refuse a checkpoint that does not say where its run stood, as this one's would.

    Raises:
        TrainingError: says what is wrong with it.
    """
    try:
        loops = dict(checkpoint.get("loops", {}))
        for name in ("fit_loop", "validate_loop", "test_loop", "predict_loop"):
            ours, theirs = getattr(trainer, name).state_dict(), dict(loops.get(name) or {})
            _check_loaders(ours.pop("state_dict"), theirs.pop("state_dict", None), name)
            check_alike(theirs, ours, name)
        data = trainer.datamodule
        if data is not None and (known := checkpoint.get(type(data).__qualname__)) is not None:
            _check_loaders({}, {"combined_loader": [known]}, type(data).__qualname__)
    except (ValueError, TypeError) as error:
        raise TrainingError(f"the checkpoint cannot be gone on from: {error}") from error


def _check_loaders(ours: Any, theirs: Any, name: str) -> None:
    """Look at the places in the data; this run's own loaders are not there yet."""
    loaders = theirs.get("combined_loader", []) if isinstance(theirs, dict) else None
    if not isinstance(loaders, list) or theirs.keys() - ours.keys() - {"combined_loader"}:
        raise ValueError(f"{name}.state_dict is {theirs!r:.100}")
    for state in loaders:
        if not isinstance(state, dict) or (
            "num_batches" in state and not all(is_count(value) for value in state.values())
        ):
            raise ValueError(f"the place in the data is {state!r:.100}")


def _moved(state: Any, place: dict[str, int]) -> Any:
    """A loader's state at another place, if it is one of ours."""
    if not isinstance(state, dict) or "num_batches" not in state:
        return state
    return state | {name: place[name] for name in state.keys() & place.keys()}


def seed_batch(run_seed: int, epoch: int, batch_idx: int, rank: int) -> None:
    """Seed torch's generators (CPU and devices), Python's and numpy's for one batch."""
    sequence = np.random.SeedSequence([run_seed, epoch, batch_idx, rank])
    seed = int(sequence.generate_state(1, np.uint64)[0])
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
