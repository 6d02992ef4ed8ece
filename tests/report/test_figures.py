import pytest
import torch

from lit_align.errors import LocalizationError
from lit_align.report import figures
from lit_align.report.figures import density_heat_map, read_metrics_csv, score_histogram


def parameter(block, module, selected, total):
    return {"block": block, "module": module, "selected": selected, "total": total}


def test_heat_map_sums_weights_and_biases_and_leaves_absent_cells_empty():
    heat_map = density_heat_map(
        "N1",
        [
            parameter(None, "embed", 10, 1000),
            parameter(0, "mlp", 50, 150),
            parameter(0, "mlp", 10, 50),
            parameter(10, "mlp", 40, 200),
            parameter(2, "mlp", 0, 200),
            parameter(2, "norm", 4, 4),
        ],
    )
    assert heat_map.columns == ("none", "0", "2", "10")
    assert heat_map.rows == ("embed", "mlp", "norm")
    assert heat_map.values == (
        (0.01, None, None, None),
        (None, 0.3, 0.0, 0.2),
        (None, None, 1.0, None),
    )
    assert heat_map.top == 0.3  # not the tiny norm's 1.0


def test_heat_map_of_an_empty_mask():
    heat_map = density_heat_map("empty", [parameter(0, "mlp", 0, 10)])
    assert heat_map.values == ((0.0,),)
    assert heat_map.top == 1.0


def test_histogram_counts_every_score_once(monkeypatch):
    monkeypatch.setattr(figures, "CHUNK", 7)  # so that tensors are cut
    scores = {"a": torch.tensor([[1e-3, -1e-3], [0.0, 1.0]]), "b": torch.full((19,), 2e-3)}
    histogram = score_histogram("change", scores, threshold=1e-3)
    assert sum(histogram.counts) == 22
    assert len(histogram.edges) == len(histogram.counts) + 1
    for value, count in [(1e-3, 2), (2e-3, 19), (1.0, 1)]:
        inside = [
            n
            for n, low, high in zip(
                histogram.counts, histogram.edges, histogram.edges[1:], strict=False
            )
            if low <= value * 1.001 < high
        ]
        assert inside == [count]
    assert histogram.caption.startswith("23 scores; 4.3 % are exactly zero")


def test_histogram_gathers_a_thin_left_tail():
    scores = {"a": torch.cat([torch.tensor([1e-30]), torch.ones(5000)])}
    histogram = score_histogram("change", scores)
    assert sum(histogram.counts) == 5001
    assert histogram.edges[0] > 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_histogram_takes_every_float_dtype(dtype):
    assert sum(score_histogram("s", {"a": torch.ones(9, dtype=dtype)}).counts) == 9


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"w": torch.tensor([1.0, float("nan")])}, "scores of w hold NaN"),
        ({"w": torch.zeros(3)}, "every score is zero"),
    ],
)
def test_scores_that_say_nothing_are_an_error(scores, message):
    with pytest.raises(LocalizationError, match=message):
        score_histogram("change", scores)


def test_reads_what_lightnings_csv_logger_writes(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,loss,step,val/loss\n0,0.69,0,\n0,nan,1,\n0,,1,0.5\n1,0.6,2,\n")
    assert read_metrics_csv(path) == {
        "loss": ([0.0, 2.0], [0.69, 0.6]),
        "val/loss": ([1.0], [0.5]),
    }
