"""Small real training runs, on token ids, so that a test says only what it is about."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from safetensors.torch import load_file
from torch import Tensor

from lit_align.data import PreferenceDataModule, SFTDataModule, UnlearningDataModule
from lit_align.data.schema import PreferenceRow, SFTRow, UnlearningRow
from lit_align.masks import ParameterMask, conv1d_row_axes, named_shapes, select
from tests.tiny_models import tiny_model, tiny_tokenizer

ACCELERATOR = "cpu"  # tests/modules/gpu runs the same on a GPU


class MemoryLogger(DummyLogger):
    """Keeps what is logged: a list of (step, values)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def values(self, name: str) -> list[float]:
        return [metrics[name] for _, metrics in self.rows if name in metrics]


def token_ids(generator: torch.Generator, shortest: int, longest: int) -> list[int]:
    length = int(torch.randint(shortest, longest + 1, (), generator=generator))
    return torch.randint(3, 300, (length,), generator=generator).tolist()


def preference_rows(count: int, seed: int = 0) -> list[PreferenceRow]:
    """Pairs of uneven lengths."""
    g = torch.Generator().manual_seed(seed)
    return [
        PreferenceRow(token_ids(g, 2, 6), token_ids(g, 1, 9), token_ids(g, 1, 9))
        for _ in range(count)
    ]


def sft_rows(count: int, seed: int = 0) -> list[SFTRow]:
    g = torch.Generator().manual_seed(seed)
    return [SFTRow(token_ids(g, 2, 6), token_ids(g, 1, 12)) for _ in range(count)]


def unlearning_rows(count: int, seed: int = 0) -> list[UnlearningRow]:
    """Every third one is retained; the others carry token weights, zeros among them."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        prompt, response = token_ids(g, 2, 6), token_ids(g, 2, 9)
        weights = (torch.randint(0, 3, (len(response),), generator=g) / 2).tolist()
        retain = i % 3 == 0
        rows.append(UnlearningRow(prompt, response, None if retain else weights, retain))
    return rows


def preferences(count: int = 10, **settings: Any) -> PreferenceDataModule:
    return _data(PreferenceDataModule, preference_rows(count), settings)


def instructions(count: int = 10, **settings: Any) -> SFTDataModule:
    return _data(SFTDataModule, sft_rows(count), settings)


def unlearning(count: int = 10, **settings: Any) -> UnlearningDataModule:
    return _data(UnlearningDataModule, unlearning_rows(count), settings)


def _data(kind: Any, rows: list[Any], settings: dict[str, Any]) -> Any:
    splits = {"train": rows} | settings.pop("splits", {})
    # In shuffled order whatever the batch size, so that runs can be compared.
    settings = {"batch_size": 4, "group_by_length": False} | settings
    return kind.from_rows(tiny_tokenizer(), splits, **settings)


def trainer(folder: Path, **settings: Any) -> lightning.Trainer:
    quiet = {
        "accelerator": ACCELERATOR, "devices": 1, "max_epochs": 1, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": folder,
    }  # fmt: skip
    return lightning.Trainer(**quiet | settings)


def random_mask(ratio: float = 0.1, granularity: str = "element", **kind: Any) -> ParameterMask:
    """A mask over all parameters of a tiny model."""
    model = tiny_model(**kind)
    g = torch.Generator().manual_seed(1)
    scores = {n: torch.rand(s, generator=g) for n, s in named_shapes(model).items()}
    return select(scores, ratio, granularity=granularity, row_axes=conv1d_row_axes(model))


def weights(module: Any) -> dict[str, Tensor]:
    """The model's weights under the base's names."""
    return {n: t.detach().to("cpu", copy=True) for n, t in module.model.state_dict().items()}


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def assert_close_weights(a: dict[str, Tensor], b: dict[str, Tensor], atol: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=name)


def assert_equal_figures(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Two runs saw the same tokens and logged the same losses, to fp32's rounding."""
    assert a["num_tokens"] == b["num_tokens"]
    for name in ("loss", "eval_loss"):
        assert b[name] == pytest.approx(a[name], rel=1e-6), name
    # Of fp32's own norm of a long vector, which adds up squares in another order.
    assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
