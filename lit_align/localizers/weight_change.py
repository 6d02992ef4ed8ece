"""Scores from training: how far each parameter moved (ALLO, arXiv 2406.12606, importance).

The paper divides |θ′ − θ| by the learning rate, which changes no ranking and is left out.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_align.errors import LocalizationError
from lit_align.localizers.lazy import ElementwiseScores
from lit_align.localizers.stored import (
    OpenParameters,
    Parameters,
    StoredParameters,
    open_parameters,
)
from lit_align.masks import ParameterMask, select
from lit_align.masks.parts import PART

MAX_TIES = 0.05


def weight_change_scores(base_dir: str | Path, trained: Parameters) -> ElementwiseScores:
    """|θ′ − θ| in fp32, θ read from the base's safetensors part by part at every read.

    Args:
        base_dir: Hugging Face folder of the base model θ, in any float precision; sharded or not.
            Where its keys are not the model's parameter names it is loaded through transformers
            (see `StoredParameters`).
        trained: θ′: the trained model, a mapping name -> parameter, or a second folder.

    Raises:
        LocalizationError: θ′ is not fp32, or the two have different parameters; names which.
        ModelError: a folder cannot be read.
    """
    after = open_parameters(trained)
    for name, dtype in after.dtypes.items():
        if dtype != torch.float32:
            raise LocalizationError(
                f"weight change needs fp32 masters: {name!r} is {dtype}, which drops most updates "
                "of usual size; train with precision 32-true or bf16-mixed"
            )
    before = StoredParameters(base_dir, after.shapes)

    def compute(name: str, start: int, stop: int) -> Tensor:
        return before.part(name, start, stop).sub_(after.part(name, start, stop)).abs_()

    return ElementwiseScores(after.shapes, compute)


def select_by_weight_change(
    base_dir: str | Path, trained: Parameters, ratio: float, **select_arguments: Any
) -> ParameterMask:
    """The entries that training moved most: `weight_change_scores`, `select`, `check_cut`.

    Args:
        base_dir: folder of the base model θ.
        trained: θ′: the trained model, a mapping name -> parameter, or a second folder.
        ratio: share of the units to select.
        **select_arguments: of `select`: scope, granularity, base_fingerprint, ...

    Raises:
        LocalizationError: as `weight_change_scores`; or fewer units changed than asked for.
        ModelError: a folder cannot be read.
    """
    scores = weight_change_scores(base_dir, trained)
    mask = select(scores, ratio, **({"method": "weight_change"} | select_arguments))
    check_cut(mask, lambda: _precision(trained))
    return mask


def check_cut(mask: ParameterMask, precision: Callable[[], str]) -> None:
    """Check that the scores of a mask tell its entries apart; warns above 5 % of ties.

    Args:
        mask: as `select` returns it.
        precision: names the precision of what was scored; called where there is something to say.

    Raises:
        LocalizationError: the threshold is zero, so that unscored entries were selected.
    """
    extra, units = mask.metadata.extra, f"{mask.metadata.granularity}s"
    if extra["threshold"] == 0:
        where = f" in {extra['threshold_parameter']!r}" if "threshold_parameter" in extra else ""
        raise LocalizationError(
            f"less than the asked {mask.metadata.ratio:.2%} of the {units} have a "
            f"{mask.metadata.method} above zero{where}: the rest would be chosen blindly. "
            f"Precision: {precision()}"
        )
    if extra["ties_at_threshold"] > MAX_TIES:
        warnings.warn(
            f"{extra['ties_at_threshold']:.1%} as many {units} as are selected tie at the "
            f"threshold {extra['threshold']:.3g}; the first of them were taken. "
            f"Precision: {precision()}",
            stacklevel=3,
        )


def _all_parts(opened: OpenParameters) -> Iterator[Tensor]:
    for name, shape in opened.shapes.items():
        numel = math.prod(shape)
        for start in range(0, numel, PART):
            yield opened.part(name, start, min(start + PART, numel))


def _precision(trained: Parameters) -> str:
    """The precision that the values of θ′ really have, whatever tensors hold them."""
    opened = open_parameters(trained)
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(part, part.to(dtype).float()) for part in _all_parts(opened)):
            return f"torch.float32 tensors whose values all fit {dtype}; was it trained in that?"
    return "torch.float32"
