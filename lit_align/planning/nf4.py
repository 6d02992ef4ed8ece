"""Linear layers in 4 bits as bitsandbytes holds them, for plans of QLoRA: sizes alone."""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

BLOCK = 64  # weights that share a scale of 8 bits
SCALES = 256  # of which share one of 32


class _Product(torch.autograd.Function):
    """y = x Wᵀ + b; the weight is unpacked once for each of the two products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.unpacked(x.dtype), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.unpacked(grad.dtype), None


class PackedLinear(nn.Linear):
    """nn.Linear whose weight is two entries a byte, with NF4's doubly quantised scales."""

    scales: Tensor

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) as it is multiplied by."""
        return self.weight.new_empty((self.out_features, self.in_features), dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        return _Product.apply(x, self)


def pack(model: PreTrainedModel) -> PreTrainedModel:
    """Hold every linear layer but the head in 4 bits, in place."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if type(module) is nn.Linear and module is not head:
            _pack_layer(module)
    return model


def _pack_layer(module: nn.Linear) -> None:
    size = module.weight.numel()
    packed: Any = nn.Parameter(
        torch.empty((-(-size // 2), 1), dtype=torch.uint8), requires_grad=False
    )
    packed.quant_state = types.SimpleNamespace(shape=module.weight.shape)
    blocks = -(-size // BLOCK)
    num_bytes = blocks + 4 * -(-blocks // SCALES)
    module.__class__ = PackedLinear
    module.weight = packed
    module.register_buffer("scales", torch.empty(num_bytes, dtype=torch.uint8))
