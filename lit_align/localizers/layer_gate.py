"""ILA's layer scores: what the learned gates say of every linear layer, on disk and as a mask.

(ILA, arXiv 2410.17875: the score of layer i is s_i, its gate σ(s_i).)
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_align.errors import LocalizationError, MaskError
from lit_align.files import write_atomically
from lit_align.masks import MaskMetadata, ParameterMask, Selection, named_shapes
from lit_align.masks.select import ceil_share
from lit_align.masks.topk import top_k
from lit_align.strict_json import read_json_file

FORMAT_VERSION = 1
SATURATED = 0.01  # a gate this near to 0 or 1 has next to no gradient left


@dataclasses.dataclass(frozen=True)
class LayerScores:
    """A score for every linear layer that a fine-tuning changed.

    Attributes:
        layers: layer → s, in the model's order; larger is more important.
        base_fingerprint: of the model that was fine-tuned; None: unknown.
        initial_score: s_0, of every layer.
        change: the folder of the change whose layers were scored.
        loss: what s was trained by.
        steps: how many steps s took.
        unscored: linear layers that the fine-tuning did not change, which have no score.
        extra: anything else that JSON can hold (optimiser, seed).
    """

    layers: dict[str, float]
    base_fingerprint: str | None = None
    initial_score: float = 4.0
    change: str | None = None
    loss: str | None = None
    steps: int = 0
    unscored: tuple[str, ...] = ()
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def gates(self) -> dict[str, float]:
        """Layer → σ(s)."""
        scores = torch.tensor(list(self.layers.values()), dtype=torch.float64)
        return dict(zip(self.layers, torch.sigmoid(scores).tolist(), strict=True))

    @property
    def saturated_share(self) -> float:
        """Share of the gates within 0.01 of 0 or of 1, where they have next to no gradient."""
        near = [min(g, 1 - g) < SATURATED for g in self.gates.values()]
        return sum(near) / max(1, len(near))

    @property
    def saturated(self) -> bool:
        """Whether all of them are: the ranking then says little."""
        return self.saturated_share == 1.0

    @property
    def spread(self) -> float:
        """Largest − smallest score; 0 where nothing tells the layers apart."""
        return max(self.layers.values()) - min(self.layers.values())

    @property
    def ties(self) -> int:
        """How many layers share their score with another: their order is the model's."""
        return sum(count for count in Counter(self.layers.values()).values() if count > 1)

    def ranking(self) -> list[str]:
        """Layers from the most to the least important; equal ones in the model's order."""
        return sorted(self.layers, key=lambda name: -self.layers[name])

    def write(self, path: str | Path) -> Path:
        """Write JSON, whole or not at all; its folder is made where it is missing."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        said = {
            "saturated": self.saturated,
            "saturated_share": self.saturated_share,
            "spread": self.spread,
            "ties": self.ties,
            "gates": self.gates,
        }
        document = {"format_version": FORMAT_VERSION} | dataclasses.asdict(self) | said
        write_atomically(path, json.dumps(document, indent=1).encode() + b"\n")
        return path


def read_scores(path: str | Path) -> LayerScores:
    """Scores that `LayerScores.write` wrote.

    Raises:
        LocalizationError: the file is missing, no scores, or damaged; names it.
    """
    path = Path(path)
    try:
        document = read_json_file(path)
        version = document.pop("format_version")
        known = {field.name for field in dataclasses.fields(LayerScores)}
        scores = LayerScores(**{name: v for name, v in document.items() if name in known})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise LocalizationError(f"{path}: not a file of layer scores: {error!r}") from error
    if version != FORMAT_VERSION:
        raise LocalizationError(
            f"{path}: format version {version!r:.40} of layer scores; this lit-align reads "
            f"{FORMAT_VERSION}"
        )
    if fault := _fault(scores):
        raise LocalizationError(f"{path}: damaged: {fault}")
    return dataclasses.replace(scores, unscored=tuple(scores.unscored))


def _fault(scores: LayerScores) -> str | None:
    """What is wrong with scores from a file; None where nothing is."""
    layers: Any = scores.layers
    if not isinstance(layers, dict) or not layers or not all(map(_is_number, layers.values())):
        return "layer scores are finite numbers, at least one"
    if not _are_names(list(layers)) or not _are_names(scores.unscored):
        return "the names of its layers are no lists of names"
    if not _is_number(scores.initial_score) or type(scores.steps) is not int or scores.steps < 0:
        return "initial_score and steps are no numbers"
    texts = (scores.base_fingerprint, scores.change, scores.loss)
    if not all(text is None or isinstance(text, str) for text in texts):
        return "base_fingerprint, change and loss are no texts"
    return None if isinstance(scores.extra, dict) else "extra is no object"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)  # strict_json lets no infinity and no NaN through


def _are_names(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(name, str) and name.isprintable() for name in values
    )


def layer_gate_mask(
    scores: LayerScores | Mapping[str, float],
    model_or_shapes: nn.Module | Mapping[str, Any],
    ratio: float,
    *,
    lowest: bool = False,
    base_fingerprint: str | None = None,
) -> ParameterMask:
    """The mask of the ceil(ratio · layers) layers with the largest scores.

    Layers are counted, not their entries, and only those that have a score. Equal scores are taken
    in the model's order; `metadata.extra` counts them (`ties_at_threshold`) and holds the `spread`.

    Args:
        scores: of linear layers, under their weights' names.
        model_or_shapes: the model, or name -> shape of all its parameters.
        ratio: share of the layers, in (0, 1].
        lowest: take those with the smallest scores: what ILA freezes.
        base_fingerprint: of the model.

    Raises:
        MaskError: a ratio outside (0, 1]; the scores belong to another model.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise MaskError(f"the ratio of a mask is a number in (0, 1], not {ratio!r}")
    found = scores if isinstance(scores, LayerScores) else LayerScores(dict(scores))
    shapes = named_shapes(model_or_shapes)
    _check_same_model(found, shapes, base_fingerprint)
    sign = -1.0 if lowest else 1.0
    ordered = {
        n: torch.tensor([sign * found.layers[n]], dtype=torch.float64)
        for n in shapes
        if n in found.layers
    }
    chosen, cut = top_k(ordered, lambda total: ceil_share(ratio, total))
    selections = {
        n: Selection.all(s) if n in chosen and chosen[n].count() else Selection.none(s)
        for n, s in shapes.items()
    }
    metadata = MaskMetadata(
        method="layer_gate",
        granularity="layer",
        ratio=ratio,
        scope="global",
        base_fingerprint=base_fingerprint or found.base_fingerprint,
        extra={
            "lowest": lowest,
            "layers_selected": cut.k,
            "layers_scored": len(ordered),
            "threshold": sign * cut.value,
            "ties_at_threshold": cut.undecided / cut.k,
            "spread": found.spread,
            "saturated": found.saturated,
        },
    )
    return ParameterMask(selections, metadata)


def _check_same_model(
    scores: LayerScores, shapes: Mapping[str, tuple[int, ...]], base_fingerprint: str | None
) -> None:
    for name in scores.layers:
        if name not in shapes:
            raise MaskError(
                f"the scores rank {name!r}, which the model does not have: they are another "
                "architecture's; carry them over with `lit_align.masks.transfer`"
            )
    own = scores.base_fingerprint
    if None not in (own, base_fingerprint) and own != base_fingerprint:
        raise MaskError(
            f"the scores were learned on a model with fingerprint {own}, this model's is "
            f"{base_fingerprint}"
        )
