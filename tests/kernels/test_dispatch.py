import logging

import pytest
import torch

from lit_align_kernels import dispatch
from lit_align_kernels.dispatch import implementation_for
from lit_align_kernels.masked_weight_grad import masked_weight_grad
from tests.kernels.cases import entries_of

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("LIT_ALIGN_KERNELS", raising=False)
    dispatch._log_choice.cache_clear()


def test_auto_is_torch_where_no_kernel_exists():
    assert implementation_for("some_operation", CPU) == "torch"
    assert implementation_for("some_operation", GPU) == "torch"


@pytest.mark.parametrize(
    ("choice", "device", "expected"),
    [
        ("auto", GPU, "triton"),
        ("auto", CPU, "torch"),
        ("triton", GPU, "triton"),
        ("torch", GPU, "torch"),
        ("torch", CPU, "torch"),
    ],
)
def test_an_operation_with_a_kernel(monkeypatch, choice, device, expected):
    monkeypatch.setenv("LIT_ALIGN_KERNELS", choice)
    assert implementation_for("masked_adamw", device) == expected


def test_on_a_cpu_a_kernel_runs_in_the_interpreter_alone(monkeypatch):
    monkeypatch.setenv("LIT_ALIGN_KERNELS", "triton")
    with pytest.raises(NotImplementedError, match="masked_adamw cannot run in Triton here"):
        implementation_for("masked_adamw", CPU)
    monkeypatch.setattr("triton.knobs.runtime.interpret", True)
    assert implementation_for("masked_adamw", CPU) == "triton"


def test_without_triton_a_gpu_runs_torch(monkeypatch):
    monkeypatch.setattr(dispatch, "_triton_is_installed", lambda: False)
    assert implementation_for("masked_adamw", GPU) == "torch"
    monkeypatch.setenv("LIT_ALIGN_KERNELS", "triton")
    with pytest.raises(NotImplementedError, match="triton is not installed"):
        implementation_for("masked_adamw", GPU)


def test_asking_for_a_kernel_that_does_not_exist_is_an_error(monkeypatch):
    monkeypatch.setenv("LIT_ALIGN_KERNELS", "triton")
    with pytest.raises(NotImplementedError, match="some_operation cannot run in Triton"):
        implementation_for("some_operation", GPU)


def test_an_unknown_choice_is_an_error(monkeypatch):
    monkeypatch.setenv("LIT_ALIGN_KERNELS", "cuda")
    with pytest.raises(ValueError, match="LIT_ALIGN_KERNELS='cuda'"):
        implementation_for("some_operation", CPU)


def test_the_operations_ask(monkeypatch):
    monkeypatch.setenv("LIT_ALIGN_KERNELS", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        masked_weight_grad(torch.ones(2, 3), torch.ones(2, 4), entries_of("all", (3, 4)))


def test_the_choice_is_logged_once(caplog):
    caplog.set_level(logging.INFO, logger=dispatch.logger.name)
    for _ in range(3):
        implementation_for("some_operation", CPU)
    assert caplog.messages == ["some_operation runs in torch (LIT_ALIGN_KERNELS=auto, device cpu)"]
