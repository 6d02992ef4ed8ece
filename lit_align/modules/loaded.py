"""How modules come by their model: load, ask for a mask, restrict, reference log-probs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, SchedulerType

from lit_align.compact import Delta, apply_delta, restrict, use_fast_products
from lit_align.compact.adapters import (
    AdapterSettings,
    adapter_share,
    add_adapters,
    has_adapters,
)
from lit_align.errors import TrainingError
from lit_align.language_model import load_language_model
from lit_align.masks import ParameterMask, named_shapes
from lit_align.modules.activation_checkpointing import (
    GradientCheckpointing,
    checkpoint_activations,
)
from lit_align.modules.forward import check_head
from lit_align.modules.parallel import data_parallel_mesh, leave_inference_mode_out, shard
from lit_align.modules.referenced import Reference, ReferencedModule, check_reference
from lit_align.modules.shared_prefix import enable_shared_prefix
from lit_align.shards import is_sharded

DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16}


class LoadedModule(ReferencedModule):
    """Holds the settings, and loads its model in `configure_model`.

    A callback with `parameter_mask(trainer, module)` (`KeyParameterLocalization`) may restrict
    training to a mask there.
    """

    def __init__(
        self,
        model: str,
        *,
        delta: str | None = None,
        learning_rate: float = 1e-6,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        lr_scheduler: str = "cosine",
        min_lr_ratio: float = 0.0,
        warmup_ratio: float = 0.1,
        gradient_checkpointing: GradientCheckpointing = False,
        attn_implementation: str = "sdpa",
        trust_remote_code: bool = False,
        reference: Reference = "cache",
        reference_cache: str | None = None,
        stochastic_rounding: bool = False,
        adapter: AdapterSettings | None = None,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            model: local folder, hub id or alias of a causal language model.
            delta: file of a delta to apply to it first; the reference policy includes it.
            learning_rate: peak.
            weight_decay: decoupled, on trained entries alone.
            betas: of AdamW.
            eps: of AdamW.
            lr_scheduler: a name that `transformers.get_scheduler` knows.
            min_lr_ratio: of `cosine`: the share of the peak that it ends at.
            warmup_ratio: share of all steps with linear warm-up.
            gradient_checkpointing: trade time for activation memory: `true` keeps the inputs of
                layers alone and computes each layer twice; `selective` keeps the results of matrix
                products and attention and computes the rest again, half the memory for a few
                percent of the time (little with adapters, which keep few of them anyway).
            attn_implementation: of transformers.
            trust_remote_code: let the model's folder bring code of its own.
            reference: `cache` computes the reference's log-probs of all rows once before training;
                `swap` swaps base values in at every step (needs a mask or an adapter); `none` is
                reference-free: they count as 0.
            reference_cache: folder to keep those of `cache` in, for rows that are met again; what
                an interrupted run computed is kept. None keeps them in memory.
            stochastic_rounding: with `trainer.precision` bf16-true or 16-true, train the weights
                without fp32 masters, rounding updates up or down at random.
            adapter: train adapters (LoRA, AdaLoRA, QLoRA) in place of the weights; a mask of whole
                layers says which layers get one.

        Raises:
            TrainingError: an unknown lr_scheduler or reference, or settings that contradict each
                other.
        """
        check_choice("lr_scheduler", lr_scheduler, [s.value for s in SchedulerType])
        check_choice("gradient_checkpointing", gradient_checkpointing, (False, True, "selective"))
        check_reference(reference, reference_cache)
        if min_lr_ratio and (lr_scheduler != "cosine" or not 0 <= min_lr_ratio <= 1):
            raise TrainingError(
                f"min_lr_ratio {min_lr_ratio} is a share of the peak in [0, 1], of cosine alone; "
                f"lr_scheduler is {lr_scheduler}"
            )
        super().__init__()
        self.save_hyperparameters()
        self.hparams.update({name: _plain(value) for name, value in self.hparams.items()})
        self.adapter = AdapterSettings.of(adapter)
        self.tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def settings(self) -> Any:
        """The arguments that the module was made with."""
        return self.hparams

    def configure_model(self) -> None:
        """Load the model, ask for a mask, restrict; compute reference log-probs on the way."""
        if data_parallel_mesh(self.trainer) is not None:  # type: ignore[arg-type]
            leave_inference_mode_out(self.trainer)  # type: ignore[arg-type]
        if self.language_model is not None:
            if self.trainer.datamodule is not None:  # type: ignore[attr-defined]
                with torch.device("cpu"):
                    self._attach_reference_logps(self._reference_again)  # rows of another stage
            return
        try:
            # Lightning makes the GPU the default device here; what belongs there is put there.
            with torch.device("cpu"):
                self._configure()
        except BaseException:  # half of it would pass for the whole when it is tried again
            self.language_model = None
            raise

    def _configure(self) -> None:
        h: Any = self.hparams
        precision, dtype = self.trainer.precision, self.weight_dtype
        if h.stochastic_rounding and (dtype == torch.float32 or self.adapter is not None):
            trained = "fp32 adapters" if self.adapter else f"weights in {precision}"
            raise TrainingError(
                f"stochastic_rounding trains 16-bit weights, and this run {trained}: set "
                "trainer.precision bf16-true or 16-true, without an adapter"
            )
        mesh = data_parallel_mesh(self.trainer)  # type: ignore[arg-type]
        self._prepare_base()
        self.mask = self._requested_mask()
        if is_sharded(next(self.model.parameters())):  # by the localisation, as it was
            self._prepare_base()
        self.model.eval()
        if mesh is None:
            self._attach_reference_logps(lambda: contextlib.nullcontext(self.model))
        _disable_dropout(self.model)  # the base's: adapters bring their own
        self._restrict(dtype)
        if self.adapter is not None and not has_adapters(self.model):
            raise TrainingError(f"{type(self).__name__} takes no adapter: leave it out")
        checkpoint_activations(self.model, h.gradient_checkpointing)
        self.parallelise()
        if mesh is not None:  # whole it may not fit on a device; nothing has trained yet
            self._attach_reference_logps(lambda: contextlib.nullcontext(self.model))
        self.model.train()
        # Frozen weights and buffers are equal on every rank: DDP need not send them.
        self._ddp_params_and_buffers_to_ignore = self._untrained_names()

    def parallelise(self) -> None:
        """Shard the model over the processes, where the strategy is ModelParallelStrategy."""
        mesh = data_parallel_mesh(self.trainer)  # type: ignore[arg-type]
        if mesh is not None:
            shard(self.model, mesh)

    def _prepare_base(self) -> None:
        """Load the model as it computes in this run, not restricted yet."""
        self.language_model = self.load_base()
        if delta := self.settings.delta:
            self.delta_checksum = Delta.load(delta).checksum
        check_head(self.model)
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if getattr(data, "layout", "padded") == "shared_prefix":
            enable_shared_prefix(self.model)
        use_fast_products(self.model)

    def trained_share(self) -> float:
        """Trained parameters, an adapter's too, as a share of the base's."""
        return adapter_share(self.model) if has_adapters(self.model) else super().trained_share()

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype that the base is loaded in."""
        return DTYPES.get(str(self.trainer.precision), torch.float32)

    def load_base(self) -> PreTrainedModel:
        """The model before training, the delta included, on this rank's device.

        Where it will be sharded it stays on the CPU, from where its layers go one by one.
        """
        h: Any = self.hparams
        device = self.trainer.strategy.root_device
        on_nf4 = self.adapter is not None and self.adapter.quantization == "nf4"
        model, self.tokenizer = load_language_model(
            h.model,
            dtype=self.weight_dtype,
            attn_implementation=h.attn_implementation,
            trust_remote_code=h.trust_remote_code,
            nf4_on=device if on_nf4 else None,
        )
        if h.delta:
            apply_delta(model, h.delta)
        if data_parallel_mesh(self.trainer) is None:  # type: ignore[arg-type]
            nn.Module.to(model, device)
        return model

    def _restrict(self, dtype: torch.dtype) -> None:
        """Train adapters, the mask's entries, or everything."""
        h: Any = self.hparams
        if self.adapter is not None:
            add_adapters(self.model, self.adapter, self.mask)
            self.mask = None  # it said where adapters go
            return
        # Base values of a mask's entries are few; rows that come only after training need them.
        swaps = self.uses_reference and h.reference == "swap"
        keep_base = swaps or (
            self.uses_reference and not self.reference_free and self.mask is not None
        )
        if swaps and self.mask is None and dtype == torch.float32:
            raise TrainingError(
                "reference: swap puts base values in place of what a mask or an adapter trains, "
                "and this run trains the whole model: use reference: cache (or none)"
            )
        if self.mask is None and dtype != torch.float32:
            # fp32 masters for every entry: bf16 alone drops the updates of a low learning rate.
            self.mask = ParameterMask.full(named_shapes(self.model))
        if self.mask is not None:
            masters = not h.stochastic_rounding
            restrict(self.model, self.mask, keep_base=keep_base, masters=masters)

    def _requested_mask(self) -> ParameterMask | None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "parameter_mask"):
                mask = callback.parameter_mask(self.trainer, self)
                if mask is not None:
                    return mask
        return None

    def _untrained_names(self) -> list[str]:
        frozen = [n for n, p in self.named_parameters() if not p.requires_grad]
        return frozen + [n for n, _ in self.named_buffers()]


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Refuse a setting that is none of its choices.

    Raises:
        TrainingError: names them.
    """
    if value not in choices:
        raise TrainingError(f"{name} {value!r}: choose one of {', '.join(map(str, choices))}")


def _disable_dropout(model: nn.Module) -> None:
    """A policy and its reference are compared token by token: dropout would be noise in both."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):  # given to attention at each call
                setattr(module, name, 0.0)


def _plain(setting: Any) -> Any:
    """A setting as checkpoints can hold it: no Path, no number of numpy's."""
    if isinstance(setting, os.PathLike):
        return os.fspath(setting)
    return setting.item() if isinstance(setting, np.generic) else setting
