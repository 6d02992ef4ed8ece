"""The masks of the comparison: a short full DPO run with lit-align, and what it moved most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_align.localizers import select_by_weight_change, weight_change_scores
from lit_align.localizers.layer_gate import layer_gate_mask
from lit_align.masks import HeadLayout, ParameterMask, conv1d_row_axes
from lit_align.masks.linear_layers import linear_layers
from lit_align.pipelines.training_bench.job import Job, Result
from lit_align.pipelines.training_bench.methods import MASK_RATIOS, MaskKind, mask_file
from lit_align.pipelines.training_bench.worker.lightning_run import fit
from lit_align.pipelines.training_bench.worker.watch import Watch


def run(job: Job, folder: Path, watch: Watch) -> Result:
    """Train all parameters, write every kind of mask beside the scratch folder."""
    module, _, _ = fit(job, folder, watch)
    model: Any = module.model
    for kind, ratio in MASK_RATIOS.items():
        _mask(kind, ratio, model).save(folder.parent / mask_file(kind))
    trained = sum(p.numel() for p in model.parameters())
    return watch.result(trained_parameters=trained, optimizer_bytes=0)


def _mask(kind: MaskKind, ratio: float, model: Any) -> ParameterMask:
    """The units that moved most, of all parameters; of layers: the linear ones, by mean change."""
    base, fingerprint = model.base_dir, model.base_fingerprint
    if kind == "layer":
        scores = weight_change_scores(base, model)
        means = {name: float(scores[name].mean()) for name in linear_layers(model)}
        return layer_gate_mask(means, model, ratio, base_fingerprint=fingerprint)
    return select_by_weight_change(
        base,
        model,
        ratio,
        granularity=kind,
        row_axes=conv1d_row_axes(model),
        heads=HeadLayout.from_model(model) if kind == "head" else None,
        base_fingerprint=fingerprint,
    )
