"""Weighted losses in one pass over the head against `F.linear → log_softmax → gather → loss`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_align_kernels.benchmarks import head
from lit_align_kernels.benchmarks.case import OURS, BenchmarkCase, Run, Size, tolerance_of
from lit_align_kernels.weighted_preference_loss import TokenNPO, weighted_preference_loss

PLAIN = "linear, log_softmax, gather, loss"
PAIRS = 4

Loss = Callable[[Tensor, head.Inputs], Tensor]  # of log-probs; the sum over tokens or pairs


def cases(size: Size, device: torch.device) -> list[BenchmarkCase]:
    """Token-weighted NPO and DPO of four pairs, forward and backward with a trainable head."""
    return [
        _case("NPO", size, device, _ours_npo, _npo),
        _case("DPO", size, device, _ours_dpo, _dpo),
    ]


def _case(name: str, size: Size, device: torch.device, ours: Run, loss: Loss) -> BenchmarkCase:
    def plain(inputs: head.Inputs) -> list[Tensor]:
        logps = head.plain_logps(inputs.hidden, inputs.weight, inputs.targets)
        return inputs.gradients(loss(logps, inputs))

    def expected(inputs: head.Inputs) -> list[Tensor]:
        inputs = head.in_fp64(inputs)
        return inputs.gradients(loss(head.plain_logps_fp64(inputs), inputs))

    implementations: dict[str, Run] = {OURS: ours, PLAIN: plain}
    if device.type == "cuda":
        implementations["torch.compile"] = torch.compile(plain, dynamic=False)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return BenchmarkCase(
        operation="weighted_preference_loss",
        name=f"{name}, forward and backward, trainable head",
        make=lambda seed: head.make(size, device, seed),
        implementations=implementations,
        expected=expected,
        baseline=PLAIN,
        flops=head.flops(size, device),
        tolerance=tolerance_of(dtype) * 5,
        shapes=head.shapes(size, device),
    )


def _npo(logps: Tensor, inputs: head.Inputs) -> Tensor:
    losses = -F.logsigmoid(-head.BETA * (logps - inputs.ref_logps))
    return (inputs.token_weights * losses).sum()


def _ours_npo(inputs: head.Inputs) -> list[Tensor]:
    objective = TokenNPO(head.BETA, inputs.ref_logps, inputs.token_weights)
    loss, _ = weighted_preference_loss(inputs.hidden, inputs.weight, inputs.targets, objective)
    return inputs.gradients(loss)


def _dpo(logps: Tensor, inputs: head.Inputs, start: int = 0, stop: int | None = None) -> Tensor:
    """The sum over the whole pairs in [start, stop); a pair is two halves of equal length."""
    half = inputs.targets.numel() // (2 * PAIRS)
    rewards = inputs.token_weights[start:stop] * (logps - inputs.ref_logps[start:stop])
    by_response = rewards.view(-1, 2, half).sum(-1)
    return -F.logsigmoid(head.BETA * (by_response[:, 0] - by_response[:, 1])).sum()


def _ours_dpo(inputs: head.Inputs) -> list[Tensor]:
    tokens = inputs.targets.numel()
    loss, _ = weighted_preference_loss(
        inputs.hidden,
        inputs.weight,
        inputs.targets,
        lambda logps, start, stop: _dpo(logps, inputs, start, stop),
        groups=list(range(0, tokens + 1, tokens // PAIRS)),
    )
    return inputs.gradients(loss)
