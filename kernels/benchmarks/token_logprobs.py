"""Log-probs of targets, forward and backward, against `F.linear → log_softmax → gather`."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_align_kernels.benchmarks import head, liger
from lit_align_kernels.benchmarks.case import OURS, BenchmarkCase, Run, Size, dtype_of
from lit_align_kernels.token_logprobs import token_logprobs

PLAIN = "linear, log_softmax, gather"


def cases(
    size: Size, device: torch.device, dtype: torch.dtype | None = None
) -> list[BenchmarkCase]:
    """Forward and backward with a trainable head."""
    implementations: dict[str, Run] = {OURS: _ours, PLAIN: _plain}
    if device.type == "cuda":
        implementations["torch.compile"] = torch.compile(_plain, dynamic=False)
        if liger.is_installed():
            implementations["Liger"] = _liger
    dtype = dtype or dtype_of(device)
    return [
        BenchmarkCase(
            operation="token_logprobs",
            name="forward and backward, trainable head",
            make=lambda seed: head.make(size, device, dtype, seed),
            implementations=implementations,
            expected=_expected,
            baseline=PLAIN,
            flops=head.flops(size, device),
            tolerance=head.tolerances(dtype),
            shapes=head.shapes(size, device),
        )
    ]


def _weighted_sum(logps: Tensor, inputs: head.Inputs) -> Tensor:
    return -(logps * inputs.token_weights).sum()


def _ours(inputs: head.Inputs) -> list[Tensor]:
    logps = token_logprobs(inputs.hidden, inputs.weight, inputs.targets)
    return inputs.gradients(_weighted_sum(logps, inputs))


def _plain(inputs: head.Inputs) -> list[Tensor]:
    logps = head.plain_logps(inputs.hidden, inputs.weight, inputs.targets)
    return inputs.gradients(_weighted_sum(logps, inputs))


def _liger(inputs: head.Inputs) -> list[Tensor]:
    logps = liger.fused_linear_logps(inputs.hidden, inputs.weight, inputs.targets)
    return inputs.gradients(_weighted_sum(logps, inputs))


def _expected(inputs: head.Inputs) -> list[Tensor]:
    inputs = head.in_fp64(inputs)
    return inputs.gradients(_weighted_sum(head.plain_logps_fp64(inputs), inputs))
