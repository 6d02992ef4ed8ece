"""Damaged and forged files of every kind: nothing but lit-align's own errors comes out."""

import random
import time

import pytest

from lit_align.errors import LitAlignError
from tests.fuzz.artefacts import KINDS, Artefacts

IN_SHORT = 14  # files of a kind
SLOW = {"tokenizer", "tokenizer_config", "model_config", "planned_config"}
IN_LONG = 2000
LONGEST_SECONDS = 20.0  # for one file, on a busy machine


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    return Artefacts(tmp_path_factory.mktemp("fuzz"))


def spoil_and_read(artefact, kind: str, count: int) -> int:
    """How many of `count` spoiled files were refused."""
    good, refused = artefact.path.read_bytes(), 0
    for seed in range(count):
        source = random.Random(f"{kind}-{seed}")
        mutation = artefact.mutations[seed % len(artefact.mutations)]
        bad = mutation(good, source)
        artefact.path.write_bytes(bad)
        begun = time.perf_counter()
        try:
            artefact.read()
        except LitAlignError as error:
            assert str(error)
            refused += 1
        except BaseException as error:
            where = artefact.path.with_suffix(".bad")
            where.write_bytes(bad)
            error.add_note(f"{kind}, seed {seed}, {mutation.__name__}: {where}")
            raise
        took = time.perf_counter() - begun
        assert took < LONGEST_SECONDS, (kind, seed, mutation.__name__, took)
    artefact.path.write_bytes(good)
    artefact.read()
    return refused


@pytest.mark.parametrize("kind", KINDS)
def test_only_our_errors_come_out(artefacts, kind):
    artefact = getattr(artefacts, kind)()
    artefact.read()
    count = 6 if kind in SLOW else IN_SHORT
    assert spoil_and_read(artefact, kind, count) >= count // 3


def test_the_corpus_is_large_enough():
    assert sum(6 if kind in SLOW else IN_SHORT for kind in KINDS) >= 200


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
def test_only_our_errors_come_out_of_very_many(artefacts, kind):
    artefact = getattr(artefacts, kind)()
    count = IN_LONG // 10 if kind in SLOW else IN_LONG
    assert spoil_and_read(artefact, kind, count) > count // 3
