"""The one callback that localises key parameters, for every module."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from tqdm import tqdm

from lit_align.compact import links
from lit_align.compact.gates import weight_shapes
from lit_align.errors import LocalizationError
from lit_align.language_model import resolve_model
from lit_align.localizers import (
    HeadDistance,
    check_cut,
    gradient_scores,
    magnitude_scores,
    random_scores,
    weight_change_scores,
)
from lit_align.localizers.layer_gate import LayerScores, layer_gate_mask, read_scores
from lit_align.localizers.stored import ParametersInMemory
from lit_align.masks import HeadLayout, ParameterMask, conv1d_row_axes, select
from lit_align.masks.select import Granularity, Scope
from lit_align.shards import is_sharded, local

INPUTS = "inputs_sha256"  # key in a mask's metadata
Method = Literal["weight_change", "gradient", "random", "magnitude", "layer_gate", "head_distance"]


class KeyParameterLocalization(lightning.Callback):
    """Bring a mask to a run, or make one from it.

    - `mask`: load it; training is restricted to it.
    - `method: gradient`: |Σ grad| of the module's loss at θ over the first batches; training is
      restricted to the result and goes on.
    - `method: random | magnitude`: from the weights alone, before training; likewise.
    - `method: weight_change`: after a full fit, |θ′ − θ| gives the mask; nothing is restricted.
    - `method: layer_gate` with `scores`: the layers that ILA's gates rank highest, by the file of
      scores; training is restricted to them. Without `scores`, on a fit of `ILAMaskLearning`: the
      mask is written when the gates are learned; nothing is restricted.
    - `method: head_distance` with `trained`: the attention heads that a fine-tuned model of the
      same architecture moved furthest (ALPS); of all q, k and v, training is restricted to them.

    A computed mask is written to `output`; a file that stands there already and was computed from
    the same model, rows and settings is read instead: so a resumed run goes on with its own mask.
    Outside `fit` nothing is computed: the file is read, for the checkpoint that belongs to it.
    """

    def __init__(
        self,
        method: Method | None = None,
        ratio: float = 0.1,
        granularity: Granularity | None = None,
        scope: Scope = "global",
        *,
        mask: str | None = None,
        scores: str | None = None,
        lowest: bool = False,
        trained: str | None = None,
        heads: HeadDistance | None = None,
        output: str | None = None,
        also: dict[str, float] | None = None,
        num_batches: int = 8,
        seed: int = 0,
    ) -> None:
        """Give `mask` or `method`, not both.

        Args:
            method: how parameters are scored.
            ratio: share of the units to select.
            granularity: element, row, head or layer; default element, layer for `layer_gate`, head
                for `head_distance`.
            scope: rank all units together, or inside each parameter.
            mask: file to load.
            scores: for `layer_gate`: file of layer scores.
            lowest: for `layer_gate`: take the layers with the smallest scores.
            trained: for `head_distance`: the task model, a folder, hub id or alias.
            heads: for `head_distance`: how heads are compared, and whether other weights train.
            output: file for a computed mask; default `mask.safetensors` in the run's folder.
            also: further masks from the same scores, {file: ratio}: ALLO's N1 beside its N2.
            num_batches: for `gradient`: how many training batches a rank goes through.
            seed: for `random`.

        Raises:
            LocalizationError: both or neither of `mask` and `method` are given.
        """
        if (mask is None) == (method is None):
            raise LocalizationError("KeyParameterLocalization takes either mask or method")
        by_gate = method == "layer_gate"
        if not by_gate and (scores is not None or lowest):
            raise LocalizationError("scores and lowest are settings of the method layer_gate")
        by_head = method == "head_distance"
        _check_head_settings(by_head, trained, heads, granularity, scope)
        granularity = granularity or ("layer" if by_gate else "head" if by_head else "element")
        if by_gate and granularity != "layer":
            raise LocalizationError(f"layer_gate ranks layers, not granularity {granularity!r}")
        self.method, self.mask, self.output = method, mask, output
        self.scores, self.lowest = scores, lowest
        self.trained, self.heads = trained, heads or HeadDistance()
        self.selection: dict[str, Any] = {
            "ratio": ratio, "granularity": granularity, "scope": scope,
        }  # fmt: skip
        self.also = also or {}
        self.num_batches, self.seed = num_batches, seed

    def parameter_mask(
        self, trainer: lightning.Trainer, module: lightning.LightningModule
    ) -> ParameterMask | None:
        """The mask that this run is restricted to; the module asks while it configures its model.

        Returns:
            The mask, or None where the whole model trains (`weight_change`).

        Raises:
            MaskError: the file is damaged.
            LocalizationError: there are no scores to select by, a comparison with the base is
                asked of a run that starts from a delta, or the run leaves the weights as they are
                (adapters) or packed (NF4) where the method reads them.
        """
        if self.mask is not None:
            return ParameterMask.load(self.mask)
        if self.method in ("weight_change", "head_distance") and module.hparams.get("delta"):
            raise LocalizationError(
                f"{self.method} compares with the base, and this run starts from a delta of it: "
                "merge the delta and start from that"
            )
        if self.method == "weight_change":
            if module.hparams.get("adapter"):
                raise LocalizationError(
                    "weight_change needs weights that train, and this run trains adapters: leave "
                    "the adapter or the callback out"
                )
            return None
        if self._learns_gates(module):
            return None
        if trainer.state.fn != TrainerFn.FITTING:
            return self._mask_of_the_fit(trainer)
        if self.scores is not None:
            return self._layer_mask(read_scores(self.scores), trainer, module.language_model)
        if self.trained is not None:
            return self._head_mask(resolve_model(self.trained), trainer, module.language_model)
        inputs = self._inputs(trainer, module)
        if (known := self._known_mask(trainer, inputs)) is not None:
            return known
        model: Any = module.language_model
        if any(hasattr(p, "quant_state") for p in model.parameters()):
            raise LocalizationError(
                f"{self.method} reads the weights, and this run's are quantised: make the mask in "
                "a run without quantization and bring it with `mask`"
            )
        if self.method == "gradient":
            _accumulate_gradients(trainer, module, self.num_batches)
        mask = self._select_and_save(self._scores(model), trainer, model, inputs)
        model.zero_grad(set_to_none=True)
        return mask

    def _learns_gates(self, module: Any) -> bool:
        """Whether the mask comes from the module's own gates, at the end."""
        if self.method != "layer_gate":
            return False
        learns = hasattr(module, "layer_scores")
        if learns == (self.scores is not None):
            raise LocalizationError(
                "layer_gate reads a file of scores, or the gates that ILAMaskLearning learns: "
                + ("leave scores out here" if learns else "name the file in scores")
            )
        return learns

    def _layer_mask(self, scores: LayerScores, trainer: Any, model: Any) -> ParameterMask:
        """The layers that ILA's scores rank highest."""
        shapes = weight_shapes(model)
        base = getattr(model, "base_fingerprint", None)

        def mask(ratio: float) -> ParameterMask:
            lowest = self.lowest
            return layer_gate_mask(scores, shapes, ratio, lowest=lowest, base_fingerprint=base)

        return self._written(mask, trainer)

    def _head_mask(self, task_dir: Path, trainer: Any, model: Any) -> ParameterMask:
        """The heads that moved furthest."""
        scores = self.heads.scores(model.base_dir, task_dir)
        return self._written(
            lambda ratio: self.heads.select(model.base_dir, task_dir, scores, ratio), trainer
        )

    def _written(
        self, mask_of: Callable[[float], ParameterMask], trainer: lightning.Trainer
    ) -> ParameterMask:
        """The mask of the asked ratio; it and the further ones are written."""
        for path, ratio in self.also.items():
            self._save(mask_of(ratio), Path(path), trainer)
        mask = mask_of(self.selection["ratio"])
        self._save(mask, self._output(trainer), trainer)
        return mask

    def _mask_of_the_fit(self, trainer: lightning.Trainer) -> ParameterMask | None:
        """What `fit` wrote, for its checkpoint; without a file nothing is restricted.

        The module refuses a checkpoint that belongs to another mask.
        """
        path = self._output(trainer)
        return ParameterMask.load(path) if path.exists() else None

    def _inputs(self, trainer: Any, module: lightning.LightningModule) -> str:
        """Digest of all that a mask computed before training depends on."""
        described: dict[str, Any] = self.selection | {
            "method": self.method,
            "also": self.also,
            "seed": self.seed,
            "base_fingerprint": getattr(module.language_model, "base_fingerprint", None),
            "precision": str(trainer.precision),
            "module": [type(module).__name__, dict(module.hparams)],
        }
        if self.method == "gradient" and trainer.datamodule is not None:
            data = trainer.datamodule
            described["batches"] = [
                self.num_batches,
                data.batch_size,
                trainer.world_size,
                data.seed,
            ]
            described["rows"] = data.reference_key("train")
        text = json.dumps(described, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def _known_mask(self, trainer: lightning.Trainer, inputs: str) -> ParameterMask | None:
        path = self._output(trainer)
        if not all(p.exists() for p in (path, *map(Path, self.also))):
            return None
        mask = ParameterMask.load(path)
        if mask.metadata.extra.get(INPUTS) != inputs:
            return None
        rank_zero_info(f"{mask}: read from {path}, computed from the same inputs")
        return mask

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Select by weight change, from fp32 masters; or by the gates that were learned."""
        if self.method == "layer_gate" and self.scores is None:
            learned: Any = module
            self._layer_mask(learned.layer_scores(), trainer, learned.language_model)
        if self.method != "weight_change":
            return
        model: Any = module.language_model
        scores = weight_change_scores(model.base_dir, fp32_parameters(model))
        self._select_and_save(scores, trainer, model, inputs=None)

    def _scores(self, model: nn.Module) -> Any:
        if self.method == "gradient":
            return gradient_scores(model)
        if self.method == "random":
            return random_scores(model, self.seed)
        return magnitude_scores(model)

    def _select_and_save(
        self, scores: Any, trainer: lightning.Trainer, model: nn.Module, inputs: str | None
    ) -> ParameterMask:
        """The mask of the asked ratio; it and the further ones are written."""
        by_head = self.selection["granularity"] == "head"
        settings: dict[str, Any] = self.selection | {
            "method": self.method,
            "row_axes": conv1d_row_axes(model),
            "heads": HeadLayout.from_model(model) if by_head else None,
            "base_fingerprint": getattr(model, "base_fingerprint", None),
        }

        def mask(ratio: float) -> ParameterMask:
            found = self._checked(select(scores, **settings | {"ratio": ratio}), trainer)
            extra = found.metadata.extra | {INPUTS: inputs}
            return ParameterMask(found.selections, dataclasses.replace(found.metadata, extra=extra))

        return self._written(mask, trainer)

    def _checked(self, mask: ParameterMask, trainer: lightning.Trainer) -> ParameterMask:
        if self.method in ("weight_change", "gradient"):
            check_cut(mask, lambda: f"trained in {trainer.precision}")
        return mask

    def _output(self, trainer: lightning.Trainer) -> Path:
        return Path(self.output or Path(trainer.default_root_dir) / "mask.safetensors")

    def _save(self, mask: ParameterMask, path: Path, trainer: lightning.Trainer) -> None:
        if trainer.is_global_zero:
            mask.save(path)
        rank_zero_info(f"{mask}: {path}")


def _check_head_settings(
    by_head: bool,
    trained: str | None,
    heads: HeadDistance | None,
    granularity: Granularity | None,
    scope: Scope,
) -> None:
    """Check that the settings of `head_distance` are there, and nowhere else."""
    if not by_head and (trained is not None or heads is not None):
        raise LocalizationError("trained and heads are settings of the method head_distance")
    if by_head and trained is None:
        raise LocalizationError("head_distance compares with a task model: name it in trained")
    if by_head and (granularity not in (None, "head") or scope != "global"):
        raise LocalizationError(
            "head_distance ranks the heads of all blocks together: leave granularity and scope out"
        )


def fp32_parameters(model: nn.Module) -> ParametersInMemory:
    """The trained values of a wholly trained model in fp32, from masters where weights are 16 bit.

    Raises:
        LocalizationError: the model trained only in part, so that nothing else can have moved.
    """
    masters = {link.state.name: link for link in links(model)}
    if any(link.state.entries.kind != "all" for link in masters.values()):
        raise LocalizationError(
            "weight_change needs a full fit, and this one was restricted to a mask"
        )
    if not masters:
        return ParametersInMemory(dict(model.named_parameters()))
    shapes = {n: tuple(link.weight.shape) for n, link in masters.items()}
    return ParametersInMemory({n: link.selected for n, link in masters.items()}, shapes)


def _accumulate_gradients(trainer: Any, module: Any, num_batches: int) -> None:
    """Σ grad of the module's loss at θ over the first training batches of all ranks."""
    if trainer.datamodule is None:
        raise LocalizationError("gradient localisation reads the first batches of a data module")
    model = module.language_model
    model.requires_grad_(True)
    module.parallelise()
    batches = list(islice(trainer.datamodule.train_dataloader(), num_batches))
    if not batches:
        raise LocalizationError("there is no training batch to localise with")
    for batch in tqdm(batches, desc="gradient scores", leave=False):
        with trainer.precision_plugin.forward_context():
            loss = module.localization_loss(batch.to(trainer.strategy.root_device))
        loss.backward()
    if not torch.distributed.is_initialized():
        return
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if is_sharded(parameter):  # FSDP2 has taken the mean over ranks
            local(parameter.grad).mul_(torch.distributed.get_world_size())
        else:
            torch.distributed.all_reduce(parameter.grad)
