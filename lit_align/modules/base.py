"""What the modules of all objectives share: load, restrict, step, log, checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, SchedulerType

from lit_align.batch import PackedBatch
from lit_align.compact import (
    Delta,
    apply_delta,
    reference_policy,
    restrict,
)
from lit_align.compact.adapters import (
    AdapterSettings,
    adapter_share,
    add_adapters,
    has_adapters,
)
from lit_align.compact.rank_allocation import allocates_ranks, orthogonality
from lit_align.errors import TrainingError
from lit_align.language_model import load_language_model
from lit_align.masks import ParameterMask, named_shapes
from lit_align.modules import reference_logps
from lit_align.modules.forward import (
    check_head,
    loss_and_logps,
    per_token_logps,
    per_token_logps_with_statistics,
)
from lit_align.modules.metric_log import Reported, masked_mean
from lit_align.modules.optimized import OptimizedModule
from lit_align_kernels.weighted_preference_loss import ChunkLoss, TokenNPO

Reference = Literal["cache", "swap"]
DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16}


@dataclasses.dataclass
class Objective:
    """What a batch contributes.

    Attributes:
        loss_sum: scalar with gradient, the sum of the loss over the batch's units.
        units: scalar, how many there are (pairs, sequences or tokens): the loss is the sum over the
            whole accumulation window and all ranks divided by their units.
        reported: name → (mean, weight), for the log.
    """

    loss_sum: Tensor
    units: Tensor
    reported: Reported


class LanguageModelModule(OptimizedModule):
    """Base of the training objectives; `objective` is all that a subclass has to add.

    The model is loaded in `configure_model`; a callback with `parameter_mask(trainer, module)`
    (`KeyParameterLocalization`) may restrict training to a mask there. Checkpoints hold the
    trainable entries alone.
    """

    uses_reference: ClassVar[bool] = False
    # How many neighbouring sequences a unit of the loss needs (a pair: 2), where the loss is a sum
    # over such units of what their own log-probs give: it then takes one pass over the head, a
    # chunk of units at a time. None: it needs the whole batch, or more than log-probs.
    sequences_together: int | None = None

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
        gradient_checkpointing: bool = False,
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
            gradient_checkpointing: trade time for activation memory.
            attn_implementation: of transformers.
            trust_remote_code: let the model's folder bring code of its own.
            reference: `cache` computes the reference's log-probs of all rows once before training;
                `swap` swaps base values in at every step (needs a mask or
                an adapter).
            reference_cache: folder to keep those log-probs in; None keeps them in memory.
            stochastic_rounding: with `trainer.precision` bf16-true or 16-true, train the weights
                without fp32 masters, rounding updates up or down at random.
            adapter: train adapters (LoRA, AdaLoRA, QLoRA) in place of the weights; a mask of whole
                layers says which layers get one.

        Raises:
            TrainingError: an unknown lr_scheduler or reference.
        """
        check_choice("lr_scheduler", lr_scheduler, [s.value for s in SchedulerType])
        check_choice("reference", reference, get_args(Reference))
        if min_lr_ratio and (lr_scheduler != "cosine" or not 0 <= min_lr_ratio <= 1):
            raise TrainingError(
                f"min_lr_ratio {min_lr_ratio} is a share of the peak in [0, 1], of cosine alone; "
                f"lr_scheduler is {lr_scheduler}"
            )
        super().__init__()
        self.save_hyperparameters()
        self.adapter = AdapterSettings.of(adapter)
        self.tokenizer: PreTrainedTokenizerBase | None = None

    # ---- the objective -----------------------------------------------------------------------

    def objective(
        self, batch: PackedBatch, per_token_logps: Tensor, ref_per_token_logps: Tensor | None
    ) -> Objective:
        """The loss of a batch from the log-probs of its targets, each (N,)."""
        raise NotImplementedError

    def chunk_loss(self, batch: PackedBatch, reference: Tensor | None) -> TokenNPO | ChunkLoss:
        """The objective's loss by chunks of whole sequences; without a reference π_ref is π."""

        def loss(logps: Tensor, start: int, stop: int) -> Tensor:
            ref = self._reference_or_self(
                logps, None if reference is None else reference[start:stop]
            )
            part = batch.sequences_of_targets(start, stop, self.sequences_together or 1)
            return self.objective(part, logps, ref).loss_sum

        return loss

    def _reference_or_self(self, logps: Tensor, reference: Tensor | None) -> Tensor | None:
        return logps.detach() if self.uses_reference and reference is None else reference

    def _objective(self, batch: PackedBatch, reference: Tensor | None) -> Objective:
        """The objective with its gradient; the head's product is formed once where it can be."""
        together = self.sequences_together
        # 16-mixed multiplies the loss before the backward, which one pass would come too early for.
        if together is None or self.trainer.precision == "16-mixed":
            logps = per_token_logps(self.model, batch)
            return self.objective(batch, logps, self._reference_or_self(logps, reference))
        chunk_loss = self.chunk_loss(batch, reference)
        loss_sum, logps = loss_and_logps(self.model, batch, chunk_loss, together)
        with torch.no_grad():  # units and what is reported, of all chunks together
            found = self.objective(batch, logps, self._reference_or_self(logps, reference))
        return dataclasses.replace(found, loss_sum=loss_sum)

    def localization_loss(self, batch: PackedBatch) -> Tensor:
        """The loss at θ with the policy itself as reference: what gradient localisation follows.

        A sum over the batch's units, so that the scores do not depend on how rows are batched.
        """
        return self._objective(batch, None).loss_sum

    @property
    def settings(self) -> Any:
        """The arguments that the module was made with."""
        return self.hparams

    # ---- loading and restricting -------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the model, ask for a mask, restrict; compute reference log-probs on the way."""
        if self.language_model is not None:
            return
        h: Any = self.hparams
        precision = self.trainer.precision
        dtype = DTYPES.get(str(precision), torch.float32)
        if h.stochastic_rounding and (dtype == torch.float32 or self.adapter is not None):
            trained = "fp32 adapters" if self.adapter else f"weights in {precision}"
            raise TrainingError(
                f"stochastic_rounding trains 16-bit weights, and this run {trained}: set "
                "trainer.precision bf16-true or 16-true, without an adapter"
            )
        self.language_model, self.tokenizer = load_language_model(
            h.model,
            dtype=dtype,
            attn_implementation=h.attn_implementation,
            trust_remote_code=h.trust_remote_code,
            nf4_on=self.trainer.strategy.root_device if self._quantization == "nf4" else None,
        )
        if h.delta:
            apply_delta(self.model, h.delta)
            self.delta_checksum = Delta.load(h.delta).checksum
        nn.Module.to(self.model, self.trainer.strategy.root_device)
        check_head(self.model)
        self.mask = self._requested_mask()
        if self.uses_reference and h.reference == "cache":
            self._attach_reference_logps()
        _disable_dropout(self.model)  # the base's: adapters bring their own
        self._restrict(dtype)
        if self.adapter is not None and not has_adapters(self.model):
            raise TrainingError(f"{type(self).__name__} takes no adapter: leave it out")
        if h.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        # Frozen weights and buffers are equal on every rank: DDP need not send them.
        self._ddp_params_and_buffers_to_ignore = self._untrained_names()

    def trained_share(self) -> float:
        """Trained parameters, an adapter's too, as a share of the base's."""
        return adapter_share(self.model) if has_adapters(self.model) else super().trained_share()

    @property
    def _quantization(self) -> str:
        return "none" if self.adapter is None else self.adapter.quantization

    def _restrict(self, dtype: torch.dtype) -> None:
        """Train adapters, the mask's entries, or everything."""
        h: Any = self.hparams
        if self.adapter is not None:
            add_adapters(self.model, self.adapter, self.mask)
            self.mask = None  # it said where adapters go
            return
        # Base values of a mask's entries are few; rows that come only after training need them.
        keep_base = self.uses_reference and (self.mask is not None or h.reference == "swap")
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

    def _attach_reference_logps(self) -> None:
        """Compute (or read) reference log-probs of the rows this run uses; batches carry them."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "attach_reference_logps"):
            raise TrainingError(
                "reference: cache needs one of lit-align's data modules; use reference: swap"
            )
        self.model.eval()
        for split in ("train", "validation", "test", "predict"):
            if data.has_rows(split):
                data.attach_reference_logps(split, self._reference_logps_of(data, split))

    def _reference_logps_of(self, data: Any, split: str) -> reference_logps.RowLogps:
        h: Any = self.hparams
        key = data.reference_key(split) | {
            "model": self.model.base_fingerprint,
            "delta": self.delta_checksum,
            "precision": str(self.trainer.precision),
        }
        if self._quantization != "none":
            key["quantization"] = self._quantization
        path = Path(h.reference_cache) / f"{split}.safetensors" if h.reference_cache else None
        if path is not None and path.exists():
            return reference_logps.read(path, key)
        loader = data.dataloader(split, data.eval_batch_size)
        plugin = self.trainer.precision_plugin
        rows = reference_logps.compute(self.model, loader, len(data.rows(split)), plugin)
        if path is not None and self.trainer.is_global_zero:
            reference_logps.write(path, rows, key)
        return rows

    # ---- steps -------------------------------------------------------------------------------

    def reference_per_token_logps(self, batch: PackedBatch) -> Tensor | None:
        """(N,) log-probs of the reference, from the batch or by swapping base values in."""
        if not self.uses_reference or batch.ref_per_token_logps is not None:
            return batch.ref_per_token_logps
        with reference_policy(self.model):
            return per_token_logps(self.model, batch)

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """The batch's loss, scaled so that dividing by the window's units gives the exact mean."""
        self.throughput.start_batch()
        reference = self.reference_per_token_logps(batch)  # before the policy's graph exists
        if self.logs_next_step():
            logps, reported = self._with_statistics(batch)
            objective = self.objective(batch, logps, reference)
        else:
            objective, reported = self._objective(batch, reference), {}
        self._take_note(objective, reported, batch)
        loss_sum = objective.loss_sum
        if allocates_ranks(self.model):  # the step divides by the units
            loss_sum = loss_sum + objective.units * orthogonality(self.model)
        # Lightning divides by the number of micro-batches and averages over ranks: both undone.
        return loss_sum * self.trainer.accumulate_grad_batches * self.trainer.world_size

    @torch.compiler.disable  # Dynamo cannot follow Lightning's `log`
    def _take_note(self, objective: Objective, reported: Reported, batch: PackedBatch) -> None:
        """Check the loss, count the window's units, report."""
        self._check_finite(objective.loss_sum, batch)
        device = objective.units.device
        self.units = self.units.to(device) + objective.units.detach()
        self.loss_sum = self.loss_sum.to(device) + objective.loss_sum.detach()
        self.log_of("train").update(objective.reported | reported)
        self.throughput.add(batch.num_tokens)
        mean = objective.loss_sum.detach() / objective.units.clamp(min=1)
        self.log("loss", mean, prog_bar=True, logger=False)

    def _check_finite(self, loss: Tensor, batch: PackedBatch) -> None:
        if not loss.isfinite():
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.global_step}, rows "
                f"{sorted(set(batch.row_ids.tolist()))} of the training split; no step was taken "
                "and the last checkpoint is as it was"
            )

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Report the objective and its statistics."""
        self._evaluate(batch, "val")

    def test_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Report the objective and its statistics."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: PackedBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One record a sequence: row id, role, tokens, log-prob, and the reference's if any."""
        reference = self.reference_per_token_logps(batch)
        logps = per_token_logps(self.model, batch)
        records = []
        for sequence, row in enumerate(batch.row_ids.tolist()):
            at = batch.sequence_index == sequence
            record = {
                "row_id": row,
                "role": ("chosen", "rejected")[int(batch.sequence_roles[sequence])],
                "num_tokens": int(at.sum()),
                "logp": float(logps[at].sum()),
            }
            if reference is not None:
                record["ref_logp"] = float(reference[at].sum())
            if row >= 0:
                records.append(record)
        return records

    def _evaluate(self, batch: PackedBatch, split: str) -> None:
        reference = self.reference_per_token_logps(batch)
        logps, reported = self._with_statistics(batch)
        objective = self.objective(batch, logps, reference)
        self.log_of(split).update(objective.reported | reported)

    def _with_statistics(self, batch: PackedBatch) -> tuple[Tensor, Reported]:
        """Per-token log-probs, and entropy, accuracy and mean logits under TRL's names."""
        logps, s = per_token_logps_with_statistics(self.model, batch)
        valid = (batch.row_ids >= 0)[batch.sequence_index]
        rejected = (batch.sequence_roles == 1)[batch.sequence_index]
        reported: Reported = {
            "entropy": masked_mean(s.entropy_nats, valid),
            "mean_token_accuracy": masked_mean(s.is_argmax.float(), valid),
            "logits/chosen": masked_mean(s.mean_logit, valid & ~rejected),
            "logits/rejected": masked_mean(s.mean_logit, valid & rejected),
        }
        return logps, {n: v for n, v in reported.items() if n in self.reported_names}


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a setting that is none of its choices.

    Raises:
        TrainingError: names them.
    """
    if value not in choices:
        raise TrainingError(f"{name} {value!r}: choose one of {', '.join(choices)}")


def _disable_dropout(model: nn.Module) -> None:
    """A policy and its reference are compared token by token: dropout would be noise in both."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):  # given to attention at each call
                setattr(module, name, 0.0)
