import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(_two_threads):
    """Models this small only lose by a second thread."""
    torch.set_num_threads(1)
