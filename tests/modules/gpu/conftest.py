import pytest

import tests.training_runs


@pytest.fixture(autouse=True)
def _trained_on_the_gpu(monkeypatch):
    monkeypatch.setattr(tests.training_runs, "ACCELERATOR", "gpu")
