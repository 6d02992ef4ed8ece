"""Weighted losses in one pass over the head against `F.linear → log_softmax → gather → loss`.

Liger's fused linear DPO knows neither token weights nor given log-probs of a reference; the third
case leaves both out, so that Liger and ours do the same work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_align_kernels.benchmarks import head, liger
from lit_align_kernels.benchmarks.case import OURS, BenchmarkCase, Run, Size, dtype_of
from lit_align_kernels.weighted_preference_loss import TokenNPO, weighted_preference_loss

PLAIN = "linear, log_softmax, gather, loss"
PAIRS = 4
DPO_BETA = 0.02  # margins of hundreds of tokens do not saturate the sigmoid

Loss = Callable[[Tensor, head.Inputs], Tensor]  # of log-probs; the sum over tokens or pairs


def cases(
    size: Size, device: torch.device, dtype: torch.dtype | None = None
) -> list[BenchmarkCase]:
    """Token-weighted NPO, and DPO of four pairs; forward and backward with a trainable head."""
    dtype = dtype or dtype_of(device)
    with_liger: dict[str, Run] = {}
    if device.type == "cuda" and liger.is_installed():
        with_liger["Liger"] = _liger_dpo
    return [
        _case("NPO", size, device, dtype, _ours_npo, _npo),
        _case("DPO", size, device, dtype, _ours_dpo, _dpo),
        _case("plain DPO", size, device, dtype, _ours_plain_dpo, _plain_dpo, with_liger),
    ]


def _case(
    name: str,
    size: Size,
    device: torch.device,
    dtype: torch.dtype,
    ours: Run,
    loss: Loss,
    others: Mapping[str, Run] = MappingProxyType({}),
) -> BenchmarkCase:
    def plain(inputs: head.Inputs) -> list[Tensor]:
        logps = head.plain_logps(inputs.hidden, inputs.weight, inputs.targets)
        return inputs.gradients(loss(logps, inputs))

    def expected(inputs: head.Inputs) -> list[Tensor]:
        inputs = head.in_fp64(inputs)
        return inputs.gradients(loss(head.plain_logps_fp64(inputs), inputs))

    implementations: dict[str, Run] = {OURS: ours, PLAIN: plain}
    if device.type == "cuda":
        implementations["torch.compile"] = torch.compile(plain, dynamic=False)
    implementations |= others
    return BenchmarkCase(
        operation="weighted_preference_loss",
        name=f"{name}, forward and backward, trainable head",
        make=lambda seed: head.make(size, device, dtype, seed),
        implementations=implementations,
        expected=expected,
        baseline=PLAIN,
        flops=head.flops(size, device),
        tolerance=head.tolerances(dtype),
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
    """The mean over all pairs of what the whole ones in [start, stop) add to it."""
    weights, ref_logps = inputs.token_weights[start:stop], inputs.ref_logps[start:stop]
    return _pair_losses(weights * (logps - ref_logps), inputs).sum() / PAIRS


def _plain_dpo(logps: Tensor, inputs: head.Inputs, start: int = 0, stop: int = 0) -> Tensor:
    """The same without weights and reference."""
    return _pair_losses(logps, inputs).sum() / PAIRS


def _pair_losses(rewards: Tensor, inputs: head.Inputs) -> Tensor:
    """A pair is two halves of equal length, the chosen one first."""
    half = inputs.targets.numel() // (2 * PAIRS)
    by_response = rewards.view(-1, 2, half).sum(-1)
    return -F.logsigmoid(DPO_BETA * (by_response[:, 0] - by_response[:, 1]))


def _ours_dpo(inputs: head.Inputs) -> list[Tensor]:
    return _ours_by_pairs(inputs, _dpo)


def _ours_plain_dpo(inputs: head.Inputs) -> list[Tensor]:
    return _ours_by_pairs(inputs, _plain_dpo)


def _ours_by_pairs(inputs: head.Inputs, of_chunk: Callable[..., Tensor]) -> list[Tensor]:
    tokens = inputs.targets.numel()
    loss, _ = weighted_preference_loss(
        inputs.hidden,
        inputs.weight,
        inputs.targets,
        lambda logps, start, stop: of_chunk(logps, inputs, start, stop),
        groups=list(range(0, tokens + 1, tokens // PAIRS)),
    )
    return inputs.gradients(loss)


def _liger_dpo(inputs: head.Inputs) -> list[Tensor]:
    found = liger.fused_linear_dpo(inputs.hidden, inputs.weight, inputs.targets, PAIRS, DPO_BETA)
    return inputs.gradients(found)
