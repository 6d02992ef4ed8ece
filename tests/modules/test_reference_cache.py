"""The cache of reference log-probs: what is there is not computed again, whatever became of a run.

Forwards are counted by row: `computed` lists the rows that the reference has gone over.
"""

import multiprocessing
import os
import signal
import time
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import Precision

from lit_align import files
from lit_align.data import PreferenceDataModule
from lit_align.data.schema import PreferenceRow
from lit_align.errors import TrainingError
from lit_align.modules import reference_logps
from lit_align.modules.reference_logps import attach
from lit_align.modules.reference_store import ReferenceStore
from tests.tiny_models import tiny_model, tiny_tokenizer
from tests.training_runs import preference_rows, preferences

KEY = {"model": "tiny"}
FORK = multiprocessing.get_context("fork")  # a process that need not import everything anew


@pytest.fixture
def model():
    return tiny_model().eval()


@pytest.fixture
def store(tmp_path):
    return ReferenceStore(tmp_path / "cache", KEY)


@pytest.fixture
def computed(monkeypatch):
    """Row ids, in the order of their forwards."""
    rows = []
    forward = reference_logps.per_token_logps

    def counted(model, batch):
        rows.extend(batch.row_ids[0::2].tolist())
        return forward(model, batch)

    monkeypatch.setattr(reference_logps, "per_token_logps", counted)
    return rows


def pairs(rows=12, **settings):
    rows = preference_rows(rows) if isinstance(rows, int) else rows
    splits = settings.pop("splits", {})
    data = PreferenceDataModule.from_rows(
        tiny_tokenizer(), {"train": rows} | splits, **{"batch_size": 2} | settings
    )
    data.setup("fit")
    return data


def attached(data, model, store=None, split="train"):
    """The log-probs that the rows of a split got: row → sequence → (N,)."""
    attach(data, split, lambda: nullcontext(model), Precision(), store)
    return [[s.ref_per_token_logps for s in row.sequences] for row in data.rows(split)]


def assert_same(a, b, *, atol=0.0):
    assert len(a) == len(b)
    for of_a, of_b in zip(a, b, strict=True):
        for x, y in zip(of_a, of_b, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=atol)


def logps_by_hand(model, row):
    """From the whole logits of one unpadded sequence."""
    found = []
    for sequence in row.sequences:
        ids = torch.from_numpy(np.concatenate([sequence.prompt_ids, sequence.response_ids])).long()
        with torch.no_grad():
            logps = model(ids[None]).logits[0].log_softmax(-1)
        at = torch.arange(len(sequence.prompt_ids) - 1, len(ids) - 1)
        found.append(logps[at, ids[at + 1]].numpy())
    return found


# ---- what is served, and what is computed --------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"layout": "padded"}, {"layout": "shared_prefix"}, {"max_tokens": 60}],
    ids=str,
)
def test_the_values_are_those_of_each_sequence_by_itself(settings, model, store):
    data = pairs(**settings)
    kept = attached(data, model, store)
    assert_same(kept, [logps_by_hand(model, row) for row in data.rows("train")], atol=1e-5)
    (batch,) = data.with_rows("train", [3]).dataloader("train", 1)
    assert batch.ref_per_token_logps.tolist() == np.concatenate(kept[3]).tolist()


def test_a_second_run_computes_nothing(model, store, computed):
    kept = attached(pairs(), model, store)
    assert sorted(computed) == list(range(12))
    computed.clear()
    assert_same(attached(pairs(batch_size=5), model, store), kept)
    assert computed == []


def test_any_choice_of_the_same_rows_is_served(model, store, computed):
    rows = preference_rows(12)
    kept = attached(pairs(rows), model, store)
    computed.clear()
    assert_same(attached(pairs(rows, max_rows=5), model, store), kept[:5])
    assert_same(attached(pairs(rows[::-1]), model, store), kept[::-1])
    split = pairs(rows, validation_fraction=0.3)
    assert 0 < len(split.rows("validation")) < 12
    attached(split, model, store)
    attached(split, model, store, "validation")
    assert computed == []


def test_added_and_changed_rows_are_computed_and_named(model, store, computed, caplog):
    rows = preference_rows(6)
    kept = attached(pairs(rows), model, store)
    computed.clear()
    rows[4] = PreferenceRow(rows[4].prompt, rows[4].chosen, [*rows[4].rejected, 7])
    added = preference_rows(8)[6:]
    with caplog.at_level("INFO"):
        found = attached(pairs(rows + added), model, store)
    assert sorted(computed) == [4, 6, 7]
    assert "5 of 8 rows need no computing" in caplog.text and "(rows 4, 6, 7)" in caplog.text
    assert_same(found[:4], kept[:4])
    fresh = attached(pairs(rows + added), model)
    assert_same(found, fresh, atol=1e-5)
    assert len(found[4][1]) == len(kept[4][1]) + 1


def test_a_sequence_is_computed_once_however_often_it_comes(model, computed):
    rows = preference_rows(3)
    found = attached(pairs([rows[0], rows[1], rows[0], rows[2], rows[1]]), model)
    assert sorted(computed) == [0, 1, 3]
    assert_same([found[0], found[1]], [found[2], found[4]])


def test_the_values_do_not_need_the_batches_they_came_from(model, tmp_path):
    first, second = (ReferenceStore(tmp_path / name, KEY) for name in "ab")
    one = attached(pairs(batch_size=1), model, first)
    all_at_once = attached(pairs(batch_size=12), model, second)
    assert_same(one, all_at_once, atol=1e-5)


def test_a_reference_that_gives_no_log_probs_is_refused(model, store, monkeypatch):
    forward = reference_logps.per_token_logps

    def broken(model, batch):
        logps = forward(model, batch)
        if 5 in batch.row_ids.tolist():
            logps[batch.target_offsets[batch.row_ids.tolist().index(5)]] = torch.nan
        return logps

    monkeypatch.setattr(reference_logps, "per_token_logps", broken)
    with pytest.raises(TrainingError, match="log-probs of row 5 are NaN"):
        attached(pairs(), model, store)


def test_a_crafted_length_is_refused_with_its_row(model, store):
    attached(pairs(), model, store)
    data = pairs()
    (name,) = store.names()
    wanted = {
        reference_logps.sequence_digest(s.prompt_ids, s.response_ids)
        for row in data.rows("train")
        for s in row.sequences
    }
    found = store.read(name, wanted)
    (store.folder / name).unlink()
    sequence = data.rows("train")[7].sequences[1]
    digest = reference_logps.sequence_digest(sequence.prompt_ids, sequence.response_ids)
    store.write(found | {digest: np.append(found[digest], -1.0)})
    with pytest.raises(TrainingError, match=r"row 7 has .* in one sequence"):
        attached(data, model, store)


# ---- interrupted runs ----------------------------------------------------------------------------


def test_what_an_interrupted_run_computed_is_kept(model, store, computed, monkeypatch):
    forward = reference_logps.per_token_logps

    def interrupted(model, batch):
        if len(computed) >= 6:
            raise KeyboardInterrupt
        return forward(model, batch)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(reference_logps, "per_token_logps", interrupted)
        attached(pairs(), model, store)
    before, computed[:] = list(computed), []
    assert len(before) == 6 and len(store.names()) == 1
    attached(pairs(), model, store)
    assert Counter(before + computed) == Counter(range(12))


def _compute_and_hang(folder, while_writing):
    """In a process of its own: three parts, then no way on."""
    torch.set_num_threads(1)
    reference_logps.PART_SECONDS = 0.0  # a part a batch
    forward, rename, done = reference_logps.per_token_logps, os.replace, []

    def hang_in_forward(model, batch):
        done.append(batch)
        if len(done) == 4 and not while_writing:
            time.sleep(600)
        return forward(model, batch)

    def hang_in_rename(source, target):
        if len(done) == 4 and while_writing:
            time.sleep(600)
        rename(source, target)

    reference_logps.per_token_logps = hang_in_forward
    files.os = SimpleNamespace(**{**vars(os), "replace": hang_in_rename})
    attached(pairs(), tiny_model().eval(), ReferenceStore(folder, KEY))


def wait_for(condition):
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("while_writing", [False, True])
def test_a_killed_run_loses_the_part_in_work_alone(while_writing, model, store, computed):
    process = FORK.Process(target=_compute_and_hang, args=(store.folder, while_writing))
    process.start()
    try:
        wait_for(lambda: len(list(store.folder.glob("*.safetensors"))) == 3)
        wait_for(lambda: not while_writing or list(store.folder.glob(".*.partial")))
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list(store.folder.glob(".*.partial"))) == while_writing
    found = attached(pairs(), model, store)
    assert len(computed) == 12 - 3 * 2  # three batches of two pairs are there
    assert_same(found, attached(pairs(), model), atol=1e-5)


# ---- several processes ---------------------------------------------------------------------------


def _one_rank(rank, folder, meeting, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2
    )
    rows, forward = [], reference_logps.per_token_logps

    def counted(model, batch):
        rows.extend(r for r in batch.row_ids[0::2].tolist() if r >= 0)
        return forward(model, batch)

    reference_logps.per_token_logps = counted
    data = pairs(9)
    ranks = {"num_replicas": 2, "rank": rank}
    data.trainer = SimpleNamespace(strategy=SimpleNamespace(distributed_sampler_kwargs=ranks))
    store = ReferenceStore(folder, KEY) if folder else None
    results.put((rank, rows, attached(data, tiny_model().eval(), store)))
    torch.distributed.destroy_process_group()


def two_ranks(folder, meeting):
    """(rows computed, log-probs) of each of two ranks."""
    results = FORK.Queue()
    ranks = [
        FORK.Process(target=_one_rank, args=(r, folder, meeting, results), daemon=True)
        for r in range(2)
    ]
    for rank in ranks:
        rank.start()
    found = sorted((results.get(timeout=100) for _ in ranks), key=lambda result: result[0])
    for rank in ranks:
        rank.join(100)
    return [result[1:] for result in found]


def test_ranks_share_the_work_and_read_one_anothers_parts(model, store, computed, tmp_path):
    (mine, a), (theirs, b) = two_ranks(store.folder, tmp_path / "meeting")
    assert sorted(mine + theirs) == list(range(9)) and min(len(mine), len(theirs)) >= 4
    assert_same(a, b)
    assert_same(a, attached(pairs(9), model, store))  # one process goes on with what two wrote
    assert computed == []


def test_ranks_take_what_one_process_left(model, store, computed, tmp_path):
    kept = attached(pairs(4), model, store)
    (mine, a), (theirs, b) = two_ranks(store.folder, tmp_path / "meeting")
    assert sorted(mine + theirs) == list(range(4, 9))
    assert_same(a, b)
    assert_same(a[:4], kept)


def test_ranks_exchange_without_a_folder(model, tmp_path):
    (_, a), (_, b) = two_ranks(None, tmp_path / "meeting")
    assert_same(a, b)
    assert_same(a, attached(pairs(9), model), atol=1e-5)


def test_two_runs_at_once_do_not_spoil_each_other(model, store, computed, monkeypatch):
    """The second begins and ends while the first computes its third batch."""
    monkeypatch.setattr(reference_logps, "PART_SECONDS", 0.0)
    forward, inner = reference_logps.per_token_logps, []

    def meanwhile(model, batch):
        if len(computed) == 4 and not inner:
            inner.append(None)
            inner[0] = attached(pairs(), model, store)
        return forward(model, batch)

    monkeypatch.setattr(reference_logps, "per_token_logps", meanwhile)
    outer = attached(pairs(), model, store)
    alone = attached(preferences_of(12), model)
    assert_same(outer, alone, atol=1e-5)
    assert_same(inner[0], alone, atol=1e-5)
    computed.clear()
    assert_same(attached(pairs(), model, store), alone, atol=1e-5)
    assert computed == []


def preferences_of(count):
    data = preferences(count)
    data.setup("fit")
    return data
