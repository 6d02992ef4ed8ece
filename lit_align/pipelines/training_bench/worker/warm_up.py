"""The masks of the comparison: a short full DPO run with lit-align, and what it moved most."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_align.localizers import check_cut, weight_change_scores
from lit_align.localizers.layer_gate import layer_gate_mask
from lit_align.masks import HeadLayout, ParameterMask, conv1d_row_axes, select
from lit_align.masks.linear_layers import linear_layers
from lit_align.pipelines.training_bench.job import Job, Result
from lit_align.pipelines.training_bench.methods import MASK_RATIOS, MaskKind, mask_file
from lit_align.pipelines.training_bench.worker.lightning_run import fit
from lit_align.pipelines.training_bench.worker.watch import Watch


def run(job: Job, folder: Path, watch: Watch) -> Result:
    """Train all parameters, write every kind of mask beside the scratch folder."""
    module, _, _ = fit(job, folder, watch)
    model: Any = module.model
    lazy = weight_change_scores(model.base_dir, model)
    scores = {name: lazy[name] for name in lazy}
    for kind, ratio in MASK_RATIOS.items():
        _mask(kind, ratio, scores, model).save(folder.parent / mask_file(kind))
    trained = sum(p.numel() for p in model.parameters())
    return watch.result(trained_parameters=trained, optimizer_bytes=0)


def _mask(kind: MaskKind, ratio: float, scores: Mapping[str, Tensor], model: Any) -> ParameterMask:
    """The units that moved most, of all parameters; of layers: the linear ones, by mean change."""
    if kind == "layer":
        means = {name: float(scores[name].mean()) for name in linear_layers(model)}
        return layer_gate_mask(means, model, ratio, base_fingerprint=model.base_fingerprint)
    mask = select(
        _of_matrices(scores) if kind == "row" else scores,
        ratio,
        granularity=kind,
        row_axes=conv1d_row_axes(model),
        heads=HeadLayout.from_model(model) if kind == "head" else None,
        method="weight_change",
        base_fingerprint=model.base_fingerprint,
    )
    check_cut(mask, lambda: "torch.float32")
    return mask


def _of_matrices(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without those of norms and biases, each entry of which would be a row.

    One entry's change spreads wider than a row's mean: single entries would crowd out rows, and
    10 % of the rows would be far fewer than 10 % of the parameters.
    """
    return {n: s if s.dim() > 1 else torch.zeros_like(s) for n, s in scores.items()}
