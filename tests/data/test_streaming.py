"""Streams: shares of ranks and workers, order, bad rows, and the place within an epoch."""

import json
from itertools import chain, zip_longest

import datasets
import numpy as np
import pytest
import torch

from lit_align.data import PreferenceDataModule, SFTDataModule, UnlearningDataModule
from lit_align.data.bad_rows import BadRows
from lit_align.data.loading import RowLoader
from lit_align.data.schema import PreferenceRow
from lit_align.data.streaming import StreamedRows, shuffled
from lit_align.data.streaming_loader import RejectedRows, StreamingLoader
from lit_align.data.tokenize import RowTokenizer
from lit_align.errors import DataError
from tests.data.test_tables import WRITERS
from tests.tiny_models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PAIRS = [{"prompt": "a" * (i % 7 + 1), "chosen": f" {i}", "rejected": " no"} for i in range(23)]


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "pairs.jsonl", PAIRS)


def write(path, rows):
    return str(WRITERS[path.suffix](path, rows))


def stream(*files, kind=PreferenceRow, max_rows=None, **settings):
    loader = RowLoader(kind, RowTokenizer(TOKENIZER), max_rows=max_rows)
    return StreamedRows(loader, files, **{"batch_size": 2, "pad_id": 0} | settings)


def bad_rows_of(loaders):
    return [bad for one in loaders for bad in one.met]


def loader(rows, num_workers=0, epoch=0):
    """A loader that keeps the bad rows it meets."""
    met = []
    one = StreamingLoader(rows, num_workers, lambda: epoch, met.extend)
    one.met = met
    return one


def row_ids(batches):
    """Of each batch, one of every pair."""
    return [batch.row_ids[::2].tolist() for batch in batches]


# ---- order ------------------------------------------------------------------------------------


def test_a_buffer_of_one_keeps_the_order_and_a_large_one_permutes():
    def order(size, seed=0):
        return list(shuffled(range(50), size, np.random.default_rng(seed)))

    assert order(1) == list(range(50))
    for size in (2, 10, 50, 80):
        found = order(size)
        assert sorted(found) == list(range(50)) and found != list(range(50))
        assert found == order(size) != order(size, seed=1)
        early = max(item - place for place, item in enumerate(found))
        assert early < size  # no row comes before it can be in the buffer


def test_every_row_of_the_first_places_is_drawn_as_often():
    counts = np.zeros(4)
    for seed in range(2000):
        counts[next(iter(shuffled(range(8), 4, np.random.default_rng(seed))))] += 1
    assert abs(counts - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)


def test_the_order_depends_on_seed_and_epoch_alone(file):
    def order(seed=0, epoch=0):
        rows = stream(file, shuffle_buffer=8, seed=seed, epoch=epoch)
        return row_ids(item.batch for item in rows)

    assert order() == order() and order() != order(epoch=1) and order() != order(seed=1)
    assert sorted(chain(*order(epoch=1))) == list(range(23))
    assert row_ids(item.batch for item in stream(file))[0] == [0, 1]  # no buffer: the file's


# ---- shares -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_and_workers_share_the_global_batches_of_one(num_replicas, num_workers, file):
    settings = {"shuffle_buffer": 5, "seed": 3}
    alone = stream(file, batch_size=2 * num_replicas, **settings)
    expected = row_ids(item.batch for item in alone)
    ranks = []
    for rank in range(num_replicas):
        rows = stream(file, num_replicas=num_replicas, rank=rank, **settings)
        ranks.append(row_ids(loader(rows, num_workers)))
    assert len({len(batches) for batches in ranks}) == 1  # as many steps on every rank
    together = [sorted(i for i in chain(*parts) if i >= 0) for parts in zip(*ranks, strict=True)]
    assert together == [sorted(batch) for batch in expected]
    flat = [i for i in chain(*chain(*ranks)) if i >= 0]
    assert sorted(flat) == list(range(23))  # nothing lost, nothing twice


def test_workers_hand_over_in_the_order_of_one_process(file):
    settings = {"shuffle_buffer": 6}
    one, three = (row_ids(loader(stream(file, **settings), n)) for n in (0, 3))
    assert one == three


def test_a_rank_without_a_row_gets_a_filler_that_counts_nowhere(tmp_path):
    file = write(tmp_path / "a.jsonl", PAIRS[:5])
    ranks = [list(loader(stream(file, num_replicas=2, rank=rank))) for rank in (0, 1)]
    filler = ranks[1][1]
    assert row_ids(ranks[0]) == [[0, 2], [4]] and row_ids(ranks[1]) == [[1, 3], [-1]]
    assert filler.num_sequences == 2 and not filler.token_weights.any()
    assert filler.num_tokens == 0 and filler.sequence_roles.tolist() == [0, 1]


# ---- sources ----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_kind_of_file_gives_the_batches_of_memory(suffix, tmp_path):
    file = write(tmp_path / f"pairs{suffix}", PAIRS)
    modules = [
        PreferenceDataModule(TOKENIZER, predict_file=file, batch_size=4, streaming=streaming)
        for streaming in (True, False)
    ]
    for module in modules:
        module.setup("predict")
    ours, memory = (list(module.predict_dataloader()) for module in modules)
    for a, b in zip(ours, memory, strict=True):
        for name, value in vars(b).items():
            found = getattr(a, name)
            same = torch.equal(found, value) if torch.is_tensor(value) else found == value
            assert same, name


def test_several_files_in_order_and_the_first_rows_alone(tmp_path):
    files = [write(tmp_path / f"{i}{s}", PAIRS[i * 3 : i * 3 + 3])
             for i, s in enumerate([".jsonl", ".csv", ".parquet"])]  # fmt: skip
    rows = stream(*files, batch_size=9)
    assert [row.columns for row in rows.raw_rows(BadRows())] == PAIRS[:9]
    assert row_ids(loader(rows)) == [list(range(9))]
    assert row_ids(loader(stream(*files, max_rows=5))) == [[0, 1], [2, 3], [4]]


def test_hub_ids_stream(monkeypatch):
    calls = []

    def load_dataset(name, split, streaming):
        calls.append((name, split, streaming))
        return datasets.Dataset.from_list(PAIRS).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert row_ids(loader(stream("owner/name:test", batch_size=23))) == [list(range(23))]
    assert calls == [("owner/name", "test", True)]


def test_memory_does_not_grow_with_the_file(tmp_path):
    """What is held is the buffer and a batch, not the file."""
    path = tmp_path / "long.jsonl"
    with path.open("w") as out:
        for i in range(4000):
            out.write(json.dumps({"prompt": f"{i}", "completion": "x"}) + "\n")
    alive: set[int] = set()
    most = 0

    class Columns(dict):
        def __init__(self, *args):
            super().__init__(*args)
            alive.add(id(self))

        def __del__(self):
            alive.discard(id(self))

    from lit_align.data.schema import SFTRow

    rows = stream(str(path), kind=SFTRow, shuffle_buffer=50, batch_size=4)
    raw = rows.raw_rows
    rows.raw_rows = lambda bad: (row._replace(columns=Columns(row.columns)) for row in raw(bad))
    for number, _ in enumerate(rows):
        most = max(most, len(alive))
        if number == 200:
            break
    assert 50 <= most < 70


# ---- bad rows -----------------------------------------------------------------------------------


def spoiled(tmp_path):
    """Rows 2 and 7 cannot be used, line 5 cannot be read: it has no place in the stream."""
    lines = [json.dumps(row) for row in PAIRS[:12]]
    lines[2] = json.dumps(PAIRS[2] | {"chosen": ""})
    lines[8] = json.dumps({"text": "x"})
    lines.insert(4, "not json")
    path = tmp_path / "spoiled.jsonl"
    path.write_text("\n".join(lines) + "\n{\n", "utf-8")
    return str(path)


@pytest.mark.parametrize(("num_replicas", "num_workers"), [(1, 0), (2, 0), (2, 2)])
def test_bad_rows_are_told_once_and_batches_keep_their_places(num_replicas, num_workers, tmp_path):
    file = spoiled(tmp_path)
    loaders = [
        loader(stream(file, num_replicas=num_replicas, rank=rank), num_workers)
        for rank in range(num_replicas)
    ]
    ranks = [row_ids(one) for one in loaders]
    parts = [sorted(i for i in chain(*p) if i >= 0) for p in zip_longest(*ranks, fillvalue=[])]
    size = 2 * num_replicas
    places = [list(range(i, min(i + size, 12))) for i in range(0, 12, size)]
    assert parts == [[i for i in batch if i not in (2, 8)] for batch in places]
    told = sorted((bad.line, bad.reason) for bad in bad_rows_of(loaders))
    assert told == [
        (3, "no response"), (5, "not JSON"), (10, "columns fit no known format"), (14, "not JSON"),
    ]  # fmt: skip


def test_no_usable_row_at_all(tmp_path):
    file = write(tmp_path / "bad.jsonl", [{"text": "x"}] * 3)
    with pytest.raises(DataError, match=r"bad\.jsonl: no usable row"):
        list(loader(stream(file)))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl: no usable row"):
        list(loader(stream(str(tmp_path / "empty.jsonl"))))
    # A rank for which there is no row is no error.
    file = write(tmp_path / "one.jsonl", PAIRS[:1])
    assert row_ids(loader(stream(file, num_replicas=2, rank=1))) == [[-1]]


def test_rejected_rows_are_written_once(tmp_path):
    bad = BadRows()
    list(loader(stream(spoiled(tmp_path)))._loader)  # readable
    one = loader(stream(spoiled(tmp_path)))
    list(one)
    path = tmp_path / "new" / "rejected_rows.jsonl"
    log = RejectedRows(path, keep=False)
    log.add(one.met)
    log.add(one.met[:2])
    assert [json.loads(line)["line"] for line in path.open()] == [b.line for b in one.met]
    bad.rows = one.met
    assert path.read_text() == bad.write(tmp_path).read_text()
    RejectedRows(path, keep=True).add(one.met)
    assert len(path.read_text().splitlines()) == 4
    RejectedRows(path, keep=False).add(one.met[:1])
    assert len(path.read_text().splitlines()) == 1


# ---- the place within an epoch ------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 5, 12])
def test_a_loader_goes_on_after_the_batches_that_were_taken(taken, num_workers, file):
    def rows():
        return stream(file, shuffle_buffer=7)

    whole = row_ids(loader(rows(), epoch=4))
    first = loader(rows(), epoch=4)
    iterator = iter(first)
    for _ in range(taken):
        next(iterator)
        first.count_batch()
    next(iterator, None)  # a batch ahead, as Lightning fetches it
    state = json.loads(json.dumps(first.state_dict()))
    assert state == ({"epoch": 4, "num_batches": taken} if taken < 12
                     else {"epoch": 5, "num_batches": 0})  # fmt: skip
    second = loader(rows(), num_workers, epoch=9)
    second.load_state_dict(state)
    assert second.state_dict() == state
    left = whole[taken:] if taken < 12 else row_ids(loader(rows(), epoch=5))
    assert row_ids(second) == left


def test_rows_before_the_place_are_not_tokenised(file, monkeypatch):
    rows = stream(file, skip=10)
    seen = []
    tokenized = RowLoader.tokenized
    monkeypatch.setattr(
        RowLoader,
        "tokenized",
        lambda self, columns, row_id: (seen.append(row_id), tokenized(self, columns, row_id))[1],
    )
    list(rows)
    assert seen == [20, 21, 22]


# ---- settings -------------------------------------------------------------------------------


def test_settings_that_cannot_be(file):
    with pytest.raises(DataError, match="give validation_file"):
        PreferenceDataModule(TOKENIZER, file, streaming=True, validation_fraction=0.1)
    with pytest.raises(DataError, match="shuffle_buffer is -1"):
        PreferenceDataModule(TOKENIZER, file, streaming=True, shuffle_buffer=-1)
    typed = {"train": [PreferenceRow("a", " b", " c")]}
    module = PreferenceDataModule.from_rows(TOKENIZER, typed, streaming=True)
    with pytest.raises(DataError, match="these rows are in memory"):
        module.setup("fit")
    with pytest.raises(DataError, match="no such file or folder"):
        PreferenceDataModule(TOKENIZER, "absent.jsonl", streaming=True).setup("fit")
    with pytest.raises(DataError, match="format is"):
        PreferenceDataModule(TOKENIZER, file, streaming=True, format="x").setup("fit")


def test_what_needs_all_rows_says_the_way_out(file):
    module = PreferenceDataModule(TOKENIZER, file, streaming=True)
    module.setup("fit")
    assert module.has_rows("train") and not module.has_rows("validation")
    with pytest.raises(DataError, match=r"train rows are streamed.*set reference: swap"):
        module.rows("train")


def test_the_key_of_a_streams_rows_follows_the_files(tmp_path):
    def key(rows):
        module = SFTDataModule(TOKENIZER, write(tmp_path / "a.jsonl", rows), streaming=True)
        module.setup("fit")
        return module.reference_key("train")["rows"]

    rows = [{"prompt": "a", "completion": "b"}]
    assert key(rows) != key(rows * 2)


def test_unlearning_streams_roles_and_weights(tmp_path):
    rows = [
        {"prompt_ids": [5], "response_ids": [6, 7], "token_weights": [0.0, 1.0]},
        {"prompt_ids": [5], "response_ids": [8], "retain": True},
    ]
    module = UnlearningDataModule(
        TOKENIZER, write(tmp_path / "u.jsonl", rows), streaming=True, shuffle_buffer=0
    )
    module.setup("fit")
    (batch,) = module.train_dataloader()
    assert batch.sequence_roles.tolist() == [1, 0] and batch.token_weights.tolist() == [0, 1, 1]
