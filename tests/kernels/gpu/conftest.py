import contextlib
import os

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS with the same bits every time


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan():
    """As in the other lanes; what torch itself cannot do deterministically, may stay so."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _bodies_on_the_card(request, monkeypatch):
    """Of a module with `BODIES`, the interpreter's tests: compiled, on tensors of the GPU."""
    bodies = getattr(request.module, "BODIES", None)
    if bodies is None:
        yield
        return
    from tests.kernels.gpu.card import OnCard, launches

    monkeypatch.setattr(bodies, "interpreted", contextlib.nullcontext)
    if hasattr(bodies, "traffic"):
        monkeypatch.setattr(bodies, "traffic", launches)
    for name, value in getattr(request.module, "REPLACED", {}).items():
        monkeypatch.setattr(bodies, name, value)
    with OnCard():
        yield
