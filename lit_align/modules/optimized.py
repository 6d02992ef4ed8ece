"""How modules step: one scale for every gradient, clipping inside the mask, the schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import get_scheduler

from lit_align.compact import trainable
from lit_align.compact.rank_allocation import allocate_ranks, allocates_ranks, plan_ranks
from lit_align.errors import TrainingError
from lit_align.modules.checkpointed import CheckpointedModule
from lit_align.optim import MaskedAdamW
from lit_align.shards import is_sharded, local


def _total_norm(grads: list[Tensor]) -> Tensor:
    """In fp32, whatever the gradients' dtype: sums over a window overflow fp16's squares.

    Of sharded gradients over all ranks, each of which holds a part of every one.
    """
    norms = torch._foreach_norm([local(g) for g in grads], 2, dtype=torch.float32)
    norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    if is_sharded(grads[0]):
        squares = norm.square()
        torch.distributed.all_reduce(squares)
        norm = squares.sqrt()
    return norm


class OptimizedModule(CheckpointedModule):
    """Steps with MaskedAdamW (or another optimiser) over what trains.

    The loss is a sum over units (pairs, responses, tokens). `units` counts those of the window that
    is being accumulated, `loss_sum` adds up their loss; the step divides by their number on all
    ranks.

    Attributes:
        step_loss: () fp32, the mean loss a unit over the last step's window and all ranks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.units = torch.zeros(())
        self.loss_sum = torch.zeros(())
        self.step_loss = torch.tensor(torch.nan)
        self._gradient_norm = torch.zeros(())

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide by the units of the whole window on all ranks, before gradients are clipped.

        MaskedAdamW gets the factor, and clipping's, as a scalar on the device: neither is a pass
        over the gradients, which stay sums until the step. (AdaLoRA scores by the mean's.)
        """
        totals = torch.stack([self.units.float(), self.loss_sum.to(self.units.device).float()])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(totals)
        units = totals[0].where(totals[0] > 0, 1.0)
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        scale = (1.0 / units).to(grads[0].device, torch.float32)
        self.step_loss = totals[1] / units
        self.units, self.loss_sum = torch.zeros_like(self.units), torch.zeros_like(self.loss_sum)
        norm = _total_norm(grads) * scale
        # Under 16-mixed the scaler itself skips a step whose gradient is not finite.
        if not norm.isfinite() and self.trainer.precision != "16-mixed":
            raise TrainingError(self._describe_bad_gradient())
        self.log_of("train").update({"grad_norm": (norm, torch.ones_like(norm))})
        self._gradient_norm = norm
        if isinstance(optimizer, MaskedAdamW) and not allocates_ranks(self.model):
            optimizer.grad_scale = scale
        elif self.hparams["stochastic_rounding"] and not isinstance(optimizer, MaskedAdamW):
            raise TrainingError(
                f"stochastic_rounding is MaskedAdamW's; {type(optimizer).__name__} would lose most "
                "updates of 16-bit weights: leave configure_optimizers as it is, or keep masters"
            )
        else:
            torch._foreach_mul_([local(g) for g in grads], scale)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, *args: Any) -> None:
        """Step; AdaLoRA then moves its ranks, while the gradients are there."""
        super().optimizer_step(epoch, batch_idx, optimizer, *args)
        # (A step that 16-mixed skipped says nothing about the ranks.)
        if allocates_ranks(self.model) and self._gradient_norm.isfinite():
            allocate_ranks(self.model, self.global_step + 1)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm of the trained entries (`trainer.gradient_clip_val`), or by value."""
        if not isinstance(optimizer, MaskedAdamW) or optimizer.grad_scale is None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val and gradient_clip_algorithm == "value":
            grads = [p.grad for p in self.parameters() if p.grad is not None]
            torch._foreach_mul_([local(g) for g in grads], optimizer.grad_scale)
            optimizer.grad_scale = None
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            # As torch.nn.utils.clip_grad_norm_ does it, its 1e-6 included.
            coefficient = (gradient_clip_val / (self._gradient_norm + 1e-6)).clamp(max=1.0)
            optimizer.grad_scale = optimizer.grad_scale * coefficient

    def _describe_bad_gradient(self) -> str:
        names = [
            n
            for n, p in self.named_parameters()
            if p.grad is not None and not local(p.grad).isfinite().all()
        ]
        return (
            f"the gradient is not finite at step {self.global_step}, first in "
            f"{names[0] if names else 'its norm'} ({len(names)} parameters); no step was taken and "
            "the last checkpoint is as it was: lower the learning rate or look at the rows"
        )

    def configure_optimizers(self) -> Any:
        """MaskedAdamW over what trains, and the schedule, by step."""
        h: Any = self.hparams
        optimizer = MaskedAdamW(
            [p for _, p in trainable(self.model)],
            lr=h.learning_rate,
            betas=tuple(h.betas),
            eps=h.eps,
            weight_decay=h.weight_decay,
            stochastic_rounding=h.stochastic_rounding,
        )
        if allocates_ranks(self.model):
            plan_ranks(self.model, int(self.trainer.estimated_stepping_batches))
        return self.with_schedule(optimizer)

    def with_schedule(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """An optimiser and its schedule, as Lightning takes them."""
        h: Any = self.hparams
        steps = int(self.trainer.estimated_stepping_batches)
        name, settings = h.lr_scheduler, None
        if h.min_lr_ratio:
            name, settings = "cosine_with_min_lr", {"min_lr_rate": h.min_lr_ratio}
        schedule = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=round(h.warmup_ratio * steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=settings,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
