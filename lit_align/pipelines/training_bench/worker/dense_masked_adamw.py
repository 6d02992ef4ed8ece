"""AdamW as masked training is done without compact state: everything dense, a mask at the end.

Written from the description of the public ALLO code's optimiser (arXiv 2406.12606): gradients and
moments of all parameters, decay of all of them, and the mask, a 16-bit number for every parameter
that is kept on the CPU and copied to the parameter's device in every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class DenseMaskedAdamW(torch.optim.Optimizer):
    """AdamW whose updates are multiplied by a dense mask; decay is not.

    Args:
        parameters: name → parameter.
        masks: name → bf16 tensor of the parameter's shape, 1 where it may be updated, on the CPU.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, of every entry.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        masks: Mapping[str, Tensor],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self.masks = {parameter: masks[name] for name, parameter in parameters.items()}
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(parameters.values(), defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; it takes no closure."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: nn.Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        update = (state["exp_avg"] / (1 - beta1 ** state["step"])).div_(root)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(update.mul_(self.masks[parameter].to(parameter.device)), alpha=group["lr"])
