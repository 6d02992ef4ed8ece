import itertools
import random
from functools import lru_cache

import pytest

from lit_align.pipelines.rewards.edit_distance import align

# Response, correction, edited tokens, distance: by hand.
CASES = [
    ("ABC", "ABC", "...", 0),
    ("ABC", "AXC", ".x.", 1),  # substitution
    ("ABC", "AC", ".x.", 1),  # deletion
    ("AC", "ABC", "..", 1),  # insertion: no token of the response
    ("AB", "BC", "x.", 2),  # as many edits as two substitutions, but B is kept
    ("ABCD", "WXYZ", "xxxx", 4),
    ("AAB", "AB", ".x.", 1),  # which A goes is a tie: the common beginning is kept
    ("A", "", "x", 1),
    ("", "AB", "", 2),
    ("", "", "", 0),
    ("KITTEN", "SITTING", "x...x.", 3),
]


@pytest.mark.parametrize(("response", "correction", "edited", "distance"), CASES)
def test_edits_by_hand(response, correction, edited, distance):
    alignment = align(*([ord(c) for c in text] for text in (response, correction)))
    assert "".join("x" if e else "." for e in alignment.edited) == edited
    assert alignment.distance == distance


def _brute_force(a, b):
    """(edits, edited response tokens), least first, by the definition."""

    @lru_cache(None)
    def best(i, j):
        if i == len(a):
            return len(b) - j, 0
        options = [(1, 1, i + 1, j)]
        if j < len(b):
            options += [(1, 0, i, j + 1), (*((0, 0) if a[i] == b[j] else (1, 1)), i + 1, j + 1)]
        return min((e + best(x, y)[0], m + best(x, y)[1]) for e, m, x, y in options)

    return best(0, 0)


def test_edits_are_the_fewest_and_mark_the_fewest_tokens():
    rng = random.Random(0)
    for n, m in itertools.product(range(7), range(7)):
        a, b = (tuple(rng.choices(range(3), k=k)) for k in (n, m))
        alignment = align(a, b)
        assert (alignment.distance, alignment.edited.sum()) == _brute_force(a, b), (a, b)
        # What is left of the response stands in the correction, in order.
        rest = iter(b)
        assert all(token in rest for token, e in zip(a, alignment.edited, strict=True) if not e)


def test_long_responses_take_no_time():
    rng = random.Random(0)
    a, b = (rng.choices(range(50), k=900) for _ in range(2))
    assert align(a, b).distance > 0
