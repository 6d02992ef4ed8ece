"""A head, hidden states and targets, for the benchmarks of what follows the decoder."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_align_kernels.benchmarks.case import Size, tolerance_of

# tokens, width, vocabulary
SIZES: dict[Size, tuple[int, int, int]] = {
    "tiny": (32, 48, 507),
    "small": (128, 192, 16384),
    "full": (512, 576, 49152),
}
GPU_SIZES: dict[Size, tuple[int, int, int]] = {**SIZES, "full": (4096, 4096, 151665)}
BETA = 0.1


@dataclasses.dataclass
class Inputs:
    """A trainable head and what it is asked.

    Attributes:
        hidden: (N, D), wants a gradient.
        weight: (V, D), wants a gradient.
        targets: (N,) int64.
        ref_logps: (N,) fp32.
        token_weights: (N,) fp32 in [0, 1], a third of them 0.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    ref_logps: Tensor
    token_weights: Tensor

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """The loss, and its gradients by hidden states and head."""
        return [loss.detach(), *torch.autograd.grad(loss, (self.hidden, self.weight))]


def size_of(size: Size, device: torch.device) -> tuple[int, int, int]:
    """(tokens, width, vocabulary)."""
    return (GPU_SIZES if device.type == "cuda" else SIZES)[size]


def make(size: Size, device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
    """Random inputs; the head is the same in every call's distribution, not in its values."""
    tokens, width, vocabulary = size_of(size, device)
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    hidden = normal(tokens, width).to(dtype).requires_grad_()
    weight = (2 * normal(vocabulary, width) / width**0.5).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
    ref_logps = -normal(tokens).abs() - 8
    token_weights = torch.rand(tokens, generator=generator, device=device)
    token_weights = token_weights.where(token_weights > 1 / 3, 0.0)
    return Inputs(hidden, weight, targets, ref_logps, token_weights)


def plain_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`F.linear → log_softmax → gather`."""
    logps = F.log_softmax(F.linear(hidden, weight).float(), dim=-1)
    return logps.gather(1, targets[:, None])[:, 0]


def in_fp64(inputs: Inputs) -> Inputs:
    """The same inputs in fp64."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (inputs.hidden, inputs.weight))
    return Inputs(
        hidden, weight, inputs.targets, inputs.ref_logps.double(), inputs.token_weights.double()
    )


def plain_logps_fp64(inputs: Inputs) -> Tensor:
    """Log-probs of inputs in fp64, without a detour through fp32."""
    logps = F.log_softmax(F.linear(inputs.hidden, inputs.weight), dim=-1)
    return logps.gather(1, inputs.targets[:, None])[:, 0]


def tolerances(dtype: torch.dtype) -> tuple[float, float, float]:
    """Of a loss, which averages the rounding of its tokens, and of its two gradients."""
    return 1e-3 if dtype == torch.bfloat16 else 1e-5, tolerance_of(dtype), tolerance_of(dtype)


def flops(size: Size, device: torch.device) -> int:
    """Of three products with the head: logits, and both gradients."""
    tokens, width, vocabulary = size_of(size, device)
    return 3 * 2 * tokens * width * vocabulary


def shapes(size: Size, device: torch.device) -> dict[str, int]:
    """For the record."""
    return dict(zip(("tokens", "width", "vocabulary"), size_of(size, device), strict=True))
