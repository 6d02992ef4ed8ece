import numpy as np
import pytest

from lit_align.errors import DataError
from lit_align.evaluation.auc import auc, mean_auc, pooled_auc


@pytest.mark.parametrize(
    ("labels", "scores", "expected"),
    [
        ([1, 0, 1, 0], [4, 3, 2, 2], 0.625),  # 4>3, 4>2, 2<3, 2=2
        ([1, 0], [1, 0], 1.0),
        ([1, 0], [0, 1], 0.0),
        ([1, 0, 0], [5, 5, 5], 0.5),  # ties alone
        ([1, 1, 0, 0, 0], [1, 0, 0, 0, 1], (0.5 + 1 + 1 + 0.5 + 0.5 + 0) / 6),
        ([0, 1, 1, 0], [-1e300, 2, 1e-300, 1e-300], (1 + 1 + 1 + 0.5) / 4),
    ],
)
def test_auc_by_hand(labels, scores, expected):
    assert auc(np.array(labels), np.array(scores)) == pytest.approx(expected, abs=1e-15)


def test_auc_equals_the_share_of_pairs():
    rng = np.random.default_rng(0)
    labels, scores = rng.random(200) < 0.3, rng.integers(0, 12, 200)
    pairs = scores[labels][:, None] - scores[~labels][None]
    assert auc(labels, scores) == pytest.approx(((pairs > 0) + (pairs == 0) / 2).mean(), abs=1e-12)
    assert auc(labels, -scores) == pytest.approx(1 - auc(labels, scores), abs=1e-12)
    assert auc(labels, np.exp(scores / 3)) == pytest.approx(auc(labels, scores), abs=1e-12)


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([1, 1], [0, 1], "positives and negatives"),
        ([0, 0], [0, 1], "positives and negatives"),
        ([], [], "positives and negatives"),
        ([0, 1], [0, np.nan], "finite"),
        ([0, 1], [0], "every label"),
    ],
)
def test_what_has_no_auc(labels, scores, message):
    with pytest.raises(DataError, match=message):
        auc(np.array(labels), np.array(scores))


ROWS = [np.array(row, bool) for row in ([1, 0], [0, 1, 0], [1, 1, 0, 0])]
SCORES = [np.array(row, float) for row in ([2, 1], [5, 5, 9], [3, 0, 2, 0])]


def test_pooled_and_by_row_by_hand():
    # Rows: 1; (0.5 + 0) / 2 = 0.25; (1 + 1 + 0 + 0.5) / 4 = 0.625.
    assert mean_auc(ROWS, SCORES).value == pytest.approx((1 + 0.25 + 0.625) / 3)
    flat = auc(np.concatenate(ROWS), np.concatenate(SCORES))
    assert pooled_auc(ROWS, SCORES).value == flat
    # Positives 2 5 3 0 against negatives 1 5 9 2 0: 2.5 + 3.5 + 3 + 0.5 of 20.
    assert flat == pytest.approx(9.5 / 20)


def test_the_interval_is_that_of_rows_drawn_anew():
    rng = np.random.default_rng(1)
    labels = [np.arange(8) % 2 == 0 for _ in range(60)]
    scores = [row + rng.normal(0, 2, 8) + rng.normal() for row in labels]
    for estimate in (pooled_auc, mean_auc):
        found = estimate(labels, scores, samples=400)
        assert found.low < found.value < found.high
        assert found == estimate(labels, scores, samples=400)
        assert found != estimate(labels, scores, samples=400, seed=1)
    by_row = [auc(*pair) for pair in zip(labels, scores, strict=True)]
    found = mean_auc(labels, scores, samples=4000)
    error = np.std(by_row) / np.sqrt(60)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_the_pooled_interval_by_all_samples_of_two_rows():
    labels = [np.array([1, 0], bool), np.array([1, 0], bool)]
    scores = [np.array([1.0, 0.0]), np.array([0.0, 1.0])]
    # Twice the first row: 1; twice the second: 0; one of each: 0.5.
    found = pooled_auc(labels, scores, samples=2000)
    assert found == (0.5, 0.0, 1.0)


def test_one_row_has_no_interval():
    assert pooled_auc(ROWS[2:], SCORES[2:]) == (0.625, 0.625, 0.625)
