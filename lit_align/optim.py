"""MaskedAdamW: AdamW whose state, decay and clipping live inside the mask."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lit_align.compact.state import Link, write_through
from lit_align.compact.write_through import linked
from lit_align.errors import TrainingError
from lit_align.shards import local
from lit_align_kernels.masked_adamw import AdamWEntry, masked_adamw_


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW over the trainable parameters of a restricted model (or of any model).

    Moments and masters have the size of the selected entries, since those are the only trainable
    Parameters; decoupled weight decay therefore cannot move anything else. New values are written
    into the weights by the same call. With every entry selected it follows `torch.optim.AdamW`.

    Attributes:
        grad_scale: () fp32 tensor on the parameters' device, or None. A factor on every gradient of
            the next step (clipping, 1 over the units of an accumulation window), read where it is:
            no pass over the gradients, nothing waits for the GPU. The step takes it off again.

    Args:
        params: trainable parameters or groups of them, in fp32.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay of the selected entries.
        stochastic_rounding: take parameters in bf16 and fp16 too (a model restricted without
            masters): updates are rounded up or down at random, so that their mean is kept.
        seed: of that rounding; equal seeds give equal runs, resumed ones included.

    Raises:
        ValueError: a setting is out of range.
        TypeError: a parameter is in 16 bits without `stochastic_rounding`, or no float at all.
    """

    writes_through = True  # the hook after every optimiser's step leaves these weights alone

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        beta1, beta2 = betas
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and 0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise ValueError(
                f"lr {lr}, betas {betas}, eps {eps} or weight_decay {weight_decay} out of range"
            )
        defaults = {
            "lr": lr,
            "betas": (beta1, beta2),
            "eps": eps,
            "weight_decay": weight_decay,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "rounds": 0,  # steps taken: the rounding's counter, kept in checkpoints
        }
        self.grad_scale: Tensor | None = None
        super().__init__(params, defaults)
        self._links: dict[int, Link] | None = None
        self._noted: dict[int, Any] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore; the links to the weights are looked up again."""
        super().__setstate__(state)
        self.grad_scale = None
        self._links = None
        self._noted = {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; all state stands on its parameter's device, in fp32.

        torch would cast moments to a 16-bit parameter's dtype, and leave `step` on the checkpoint's
        device, where a kernel cannot read it.

        Raises:
            TrainingError: it is not the state of these parameters.
        """
        own = [(g["stochastic_rounding"], g["seed"]) for g in self.param_groups]
        self._check_state(state_dict)
        super().load_state_dict(state_dict)
        for group, (rounding, seed) in zip(self.param_groups, own, strict=True):
            # How this run rounds is its own setting; how far it has come is the checkpoint's.
            group.update(stochastic_rounding=rounding, seed=seed)
            group.setdefault("rounds", 0)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        ours = [p for group in self.param_groups for p in group["params"]]
        for i, parameter in zip(saved, ours, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                restored = torch.as_tensor(value).to(parameter.device, torch.float32, copy=True)
                self.state[parameter][name] = restored

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        saved = [list(group["params"]) for group in state_dict["param_groups"]]
        if [len(ids) for ids in saved] != [len(group["params"]) for group in self.param_groups]:
            raise TrainingError("the optimizer's state is of other parameters than these")
        ours = [p for group in self.param_groups for p in group["params"]]
        for i, parameter in zip((i for ids in saved for i in ids), ours, strict=True):
            state = state_dict["state"].get(i)
            if state is not None and not _is_state_of(state, parameter):
                raise TrainingError(
                    f"the optimizer's state of parameter {i} is not of one of {parameter.shape}"
                )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters must be fp32, or 16 bits with stochastic rounding."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        small = (torch.bfloat16, torch.float16) if group["stochastic_rounding"] else ()
        for parameter in group["params"]:
            if parameter.dtype not in (torch.float32, *small):
                raise TypeError(
                    f"MaskedAdamW trains fp32 parameters, got {parameter.dtype}: restrict the "
                    "model (selected entries are fp32 masters), load it in float32, or round "
                    "stochastically"
                )
        self._links = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; a closure, which computes the gradients, runs first.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._links is None:
            self._links = linked(self)
        for number, group in enumerate(self.param_groups):
            batch = [self._entry(p) for p in group["params"] if p.grad is not None]
            for entry in batch:
                if not entry.master.numel():  # of a small sharded parameter a rank may hold none
                    entry.step += 1
            batch = [entry for entry in batch if entry.master.numel()]
            if batch:
                batch[0].noted = self._noted.get(number)
            masked_adamw_(
                batch,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                grad_scale=self.grad_scale,
                stochastic_rounding_seed=self._rounding_seed(group, number),
            )
            if batch:
                self._noted[number] = batch[0].noted
            group["rounds"] += 1
        self.grad_scale = None
        write_through(link for link in self._links.values() if link.state.shard is not None)
        return loss

    def _rounding_seed(self, group: dict[str, Any], number: int) -> int | None:
        """Another one for every step and group."""
        if not group["stochastic_rounding"]:
            return None
        return (group["seed"] << 32) + group["rounds"] * len(self.param_groups) + number

    def _entry(self, parameter: Tensor) -> AdamWEntry:
        state = self.state[parameter]
        if state and state["step"].device != parameter.device:
            # Lightning moves restored state to the device after loading it, all but `step`.
            state["step"] = state["step"].to(parameter.device)
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        assert self._links is not None and parameter.grad is not None
        link = self._links.get(id(parameter))
        writes = link is not None and link.state.shard is None  # sharded ones: when all are known
        return AdamWEntry(
            local(parameter),
            local(parameter.grad),
            local(state["exp_avg"]),
            local(state["exp_avg_sq"]),
            state["step"],
            link.weight if link and writes else None,
            link.state.entries if link and writes else None,
        )


def _is_state_of(state: Any, parameter: Tensor) -> bool:
    """Whether these are a step and the moments of a parameter, and finite."""
    if not isinstance(state, dict) or state.keys() != {"step", "exp_avg", "exp_avg_sq"}:
        return False
    if not all(isinstance(value, Tensor) for value in state.values()):
        return False
    shaped = all(state[name].shape == parameter.shape for name in ("exp_avg", "exp_avg_sq"))
    finite = all(bool(local(value).isfinite().all()) for value in state.values())
    return shaped and finite and state["step"].numel() == 1
