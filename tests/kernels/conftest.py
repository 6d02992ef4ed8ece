import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan():
    """`torch.empty` comes filled with NaN: an entry that nothing wrote shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
