"""Scores of attention heads: how far fine-tuning moved each one (ALPS, arXiv 2505.18799).

A head's weights become a distribution over their entries, softmax(· / τ) in row-major order, and
the score is the distance between the base's and the task model's. Heads are read one at a time.

- `projection` (the paper's Eq. 5-7): the entries of W_q^h W_k^{g⊤} W_v^g, hidden × head_dim, with
  the head's own group g of keys and values. The paper calls it hidden × hidden, against its own
  shapes. It is not the output projection.
- `qkv` (the public code's): the entries of q, k and v of the head, one after the other, in the
  order of a `Linear`'s weight. The public code slices k and v by the query head, so that with
  shared keys and values most heads get none; here every head has those of its group.

The public code loads models in bfloat16 and takes the softmax in fp32. Here stored values are used
as they are, and everything after them is fp64: a short fine-tuning moves a probability by less than
fp32 resolves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lit_align.errors import LocalizationError
from lit_align.language_model import fingerprint
from lit_align.localizers.distances import METRICS, Metric
from lit_align.localizers.group_wasserstein import group_wasserstein
from lit_align.localizers.same_model import check_same_architecture, check_same_tokenizer
from lit_align.localizers.stored import meta_model
from lit_align.localizers.stored_heads import K, Q, StoredHeads, V
from lit_align.localizers.weight_change import check_cut
from lit_align.masks import HeadLayout, ParameterMask
from lit_align.masks.head_sets import (
    OtherWeights,
    Rounding,
    TrainOrFreeze,
    head_set_mask,
    top_heads,
)

Representation = Literal["projection", "qkv"]
WASSERSTEIN = ("wasserstein", "wasserstein_normalized")
SCORES = "head_scores"  # key in a mask's metadata: block index as text -> scores of its heads


@dataclasses.dataclass(frozen=True)
class HeadDistance:
    """How heads are scored, and what trains beside those that are chosen.

    Attributes:
        representation: of a head's weights: `projection` (the paper's) or `qkv` (the public
            code's).
        metric: between the two distributions.
        tau: temperature of the softmax, above 0.
        rounding: of the share of heads to their number: `ceil` (the paper), `floor` (the public
            code).
        others: whether everything outside the attention heads trains.
        o_proj: whether the attention's output projection does; None: as `others`.
    """

    representation: Representation = "projection"
    metric: Metric = "wasserstein"
    tau: float = 1.0
    rounding: Rounding = "ceil"
    others: TrainOrFreeze = "train"
    o_proj: TrainOrFreeze | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            LocalizationError: names the setting.
        """
        _check_settings(self.representation, self.metric, self.tau)

    def scores(self, base_dir: str | Path, task_dir: str | Path) -> dict[str, Tensor]:
        """See `head_distance_scores`."""
        return head_distance_scores(base_dir, task_dir, self.representation, self.metric, self.tau)

    def select(
        self,
        base_dir: str | Path,
        task_dir: str | Path,
        scores: Mapping[str, Tensor],
        ratio: float,
    ) -> ParameterMask:
        """The mask of the heads with the largest scores; its metadata holds all scores.

        Raises:
            LocalizationError: fewer heads have a score above zero than asked for.
            MaskError: a ratio outside (0, 1].
        """
        model = meta_model(base_dir)
        heads, cut = top_heads(scores, ratio, self.rounding)
        described: dict[str, Any] = {
            "representation": self.representation,
            "metric": self.metric,
            "tau": self.tau,
            "task_fingerprint": fingerprint(task_dir),
            SCORES: {block: values.tolist() for block, values in scores.items()},
        }
        mask = head_set_mask(
            HeadLayout.from_model(model),
            heads,
            model,
            OtherWeights(self.others, self.o_proj),
            method="head_distance",
            ratio=ratio,
            base_fingerprint=fingerprint(base_dir),
            extra=described | cut,
        )
        check_cut(mask, lambda: f"as stored; is {task_dir} the base itself, or a copy of it?")
        return mask


def head_distance_scores(
    base_dir: str | Path,
    task_dir: str | Path,
    representation: Representation = "projection",
    metric: Metric = "wasserstein",
    tau: float = 1.0,
) -> dict[str, Tensor]:
    """The distance between base and task model, head by head.

    Args:
        base_dir: Hugging Face folder of the base model.
        task_dir: folder of the fine-tuned one.
        representation: of a head's weights.
        metric: between the two distributions.
        tau: temperature of the softmax, above 0.

    Returns:
        Index of the block among those with attention, as text -> (num_heads,) fp64.

    Raises:
        LocalizationError: models of different architecture, shape or tokenizer; a weight that is
            not finite; an unknown representation or metric, or a τ that is not above 0.
        MaskError: a model whose heads cannot be told apart.
        ModelError: a folder cannot be read.
    """
    _check_settings(representation, metric, tau)
    check_same_architecture(base_dir, None, task_dir)
    check_same_tokenizer(base_dir, task_dir)
    base, task = StoredHeads(base_dir), StoredHeads(task_dir)
    _check_same_heads(base, task)
    shared = representation == "qkv" and metric in WASSERSTEIN
    score = _shared_scores if shared else _group_scores
    scores = {}
    for index in range(len(base.layout.blocks)):
        groups = range(base.layout.num_kv_heads)
        found = [score(base, task, index, g, representation, metric, tau) for g in groups]
        scores[str(index)] = torch.cat(found)
        if not scores[str(index)].isfinite().all():
            names = ", ".join(p.name for p in base.layout.blocks[index])
            raise LocalizationError(
                f"the {metric} of the heads of block {base.layout.block_number(index)} is not "
                f"finite: {names} hold NaN or infinity in one of the models"
            )
    return scores


def head_distance_mask(
    base_dir: str | Path,
    task_dir: str | Path,
    ratio: float = 0.1,
    representation: Representation = "projection",
    metric: Metric = "wasserstein",
    tau: float = 1.0,
    *,
    others: TrainOrFreeze = "train",
    o_proj: TrainOrFreeze | None = None,
    rounding: Rounding = "ceil",
) -> ParameterMask:
    """What trains when, of all attention weights, only the heads that moved furthest do.

    Args:
        base_dir: Hugging Face folder of the base model.
        task_dir: folder of the fine-tuned one.
        ratio: share of all query heads.
        representation: see `HeadDistance`, as for the following.
        metric: between the two distributions.
        tau: temperature of the softmax.
        others: whether everything outside the attention heads trains.
        o_proj: whether the attention's output projection does.
        rounding: of the share to a number of heads.

    Raises:
        LocalizationError: as `head_distance_scores`; or fewer heads differ than asked for.
        MaskError: a ratio outside (0, 1], or a model whose heads cannot be told apart.
        ModelError: a folder cannot be read.
    """
    settings = HeadDistance(representation, metric, tau, rounding, others, o_proj)
    return settings.select(base_dir, task_dir, settings.scores(base_dir, task_dir), ratio)


def _group_scores(
    base: StoredHeads,
    task: StoredHeads,
    index: int,
    group: int,
    representation: Representation,
    metric: Metric,
    tau: float,
) -> Tensor:
    """Scores of the query heads of one group, (heads_per_group,) fp64."""
    heads = zip(
        _distributions(base, index, group, representation, tau),
        _distributions(task, index, group, representation, tau),
        strict=True,
    )
    return torch.stack([METRICS[metric](p, q) for p, q in heads])


def _distributions(
    stored: StoredHeads, index: int, group: int, representation: Representation, tau: float
) -> Iterator[Tensor]:
    """The distribution of each query head of a group in turn, (N,) fp64."""
    keys, values = (stored.read(index, part, group).double() for part in (K, V))
    for head in stored.layout.query_heads(group):
        queries = stored.read(index, Q, head).double()
        if representation == "projection":
            entries = queries.T @ (keys @ values.T)
        else:
            entries = torch.cat([queries, keys, values])
        yield entries.flatten().div_(tau).softmax(0)


def _shared_scores(
    base: StoredHeads,
    task: StoredHeads,
    index: int,
    group: int,
    representation: Representation,
    metric: Metric,
    tau: float,
) -> Tensor:
    """`_group_scores` of `qkv` by a Wasserstein metric: what heads share is computed once."""

    def pair(part: int, head: int) -> tuple[Tensor, Tensor]:
        first, second = (stored.read(index, part, head).flatten() for stored in (base, task))
        return first, second

    queries = (pair(Q, head) for head in base.layout.query_heads(group))
    shared = [pair(K, group), pair(V, group)]
    found = group_wasserstein(queries, shared, tau)
    if found is None:
        return _group_scores(base, task, index, group, representation, metric, tau)
    scores = torch.tensor(found, dtype=torch.float64)
    if metric == "wasserstein_normalized":
        scores /= 3 * shared[0][0].numel() - 1
    return scores


def _check_same_heads(base: StoredHeads, task: StoredHeads) -> None:
    """Check that the files hold the same projections, whatever prefix their names have."""
    counts = [len(stored.layout.blocks) for stored in (base, task)]
    if counts[0] != counts[1]:
        raise LocalizationError(
            f"{base.folder} has {counts[0]} blocks with attention and {task.folder} {counts[1]}"
        )
    for (name, shape), (other, found) in zip(base.shapes.items(), task.shapes.items(), strict=True):
        if shape != found:
            raise LocalizationError(
                f"{name!r} has shape {shape} in {base.folder} and {other!r} {found} in "
                f"{task.folder}"
            )


def _check_settings(representation: str, metric: str, tau: float) -> None:
    if representation not in get_args(Representation):
        raise LocalizationError(
            f"the representation is one of {get_args(Representation)}, not {representation!r}"
        )
    if metric not in METRICS:
        raise LocalizationError(f"the metric is one of {tuple(METRICS)}, not {metric!r}")
    if not 0 < tau < float("inf"):
        raise LocalizationError(f"tau is {tau}; it must be a number above 0")
