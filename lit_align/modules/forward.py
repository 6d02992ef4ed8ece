"""From a batch to per-token log-probs: the decoder's hidden states, the head on targets only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lit_align.batch import PackedBatch
from lit_align.compact import head_handle, head_inputs
from lit_align.errors import ModelError
from lit_align.modules.decoder import hidden_states
from lit_align.modules.document_attention import DocumentLayout
from lit_align.modules.parallel import inside
from lit_align.modules.shared_prefix import enable_shared_prefix
from lit_align_kernels.token_logprobs import (
    TokenStatistics,
    WeightHandle,
    token_logprobs,
    token_logprobs_with_statistics,
)
from lit_align_kernels.weighted_preference_loss import (
    ChunkLoss,
    TokenNPO,
    weighted_preference_loss,
)


def target_hidden(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """The hidden states that predict the batch's targets: (N, D)."""
    layout = None
    if batch.documents is not None:
        enable_shared_prefix(model)
        layout = DocumentLayout(batch.documents, batch.input_ids.device)
    hidden = hidden_states(model, batch.input_ids, batch.attention_mask, batch.position_ids, layout)
    return hidden.flatten(0, 1).index_select(0, batch.hidden_index)


def _head_inputs(model: PreTrainedModel, batch: PackedBatch) -> tuple[Tensor, WeightHandle]:
    """What the head's product is taken of, for the batch's targets."""
    head: Any = model.get_output_embeddings()
    return head_inputs(head, target_hidden(model, batch))


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Check that `decoder, head, scale, cap` is what this model does: its own logits are the same.

    One forward of a few tokens, in evaluation mode and before `restrict`. Without it a model with
    anything else between decoder and logits would train on wrong log-probs and say nothing.

    Raises:
        ModelError: the two differ, or the parts cannot be called so; names the architecture.
    """
    name = type(model).__name__
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(3, 11, device=model.device).remainder(vocabulary)[None]
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    ones = torch.ones_like(ids)
    head: Any = model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        raise ModelError(f"{name} has no head whose weight gives the logits: it cannot be trained")
    try:
        theirs = model(input_ids=ids, attention_mask=ones, use_cache=False).logits
        hidden = hidden_states(model, ids, ones, positions)
        handle = head_handle(head)
        ours = scaled_logits(model, F.linear(hidden, handle.weight, handle.bias))
    except (TypeError, ValueError) as error:
        raise ModelError(f"{name} is not a decoder with a head upon it: {error}") from error
    # Both go through the same products in the model's dtype: only the scaling's rounding may show.
    allowed = 1e-5 + 4 * torch.finfo(theirs.dtype).eps * float(theirs.abs().max())
    difference = _log_softmax(ours).sub(_log_softmax(theirs)).abs().max()
    if not difference <= allowed and bool(theirs.isfinite().all()):
        raise ModelError(
            f"{name} makes its logits in a way that is not known here: log-probs from its decoder "
            f"and head differ from its own by up to {difference:.3g} nats"
        )


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits.float(), dim=-1)


def head_settings(model: PreTrainedModel) -> dict[str, float | None]:
    """How this model scales and caps its logits (Cohere, Granite, Falcon H1, Gemma 2 and 3)."""
    config = model.config.get_text_config()
    scale: float = getattr(config, "logit_scale", None) or 1.0
    scaling: float = getattr(config, "logits_scaling", None) or 1.0
    multiplier: float = getattr(config, "lm_head_multiplier", None) or 1.0
    return {
        "logit_scale": scale * multiplier / scaling,
        "soft_cap": getattr(config, "final_logit_softcapping", None),
    }


def scaled_logits(model: PreTrainedModel, logits: Tensor) -> Tensor:
    """What the model makes of its head's product (..., V): scaled, then capped."""
    settings: Any = head_settings(model)
    logits = logits * settings["logit_scale"]
    cap = settings["soft_cap"]
    return logits if cap is None else cap * torch.tanh(logits / cap)


@inside
def per_token_logps(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Log-probs of the batch's targets: (N,) fp32, nats."""
    hidden, head = _head_inputs(model, batch)
    settings: Any = head_settings(model)
    return token_logprobs(hidden, head, batch.target_ids, **settings)


@inside
def per_token_logps_with_statistics(
    model: PreTrainedModel, batch: PackedBatch
) -> tuple[Tensor, TokenStatistics]:
    """The same, and entropy, argmax hits and mean logit of each target's distribution."""
    hidden, head = _head_inputs(model, batch)
    settings: Any = head_settings(model)
    return token_logprobs_with_statistics(hidden, head, batch.target_ids, **settings)


@inside
def loss_and_logps(
    model: PreTrainedModel, batch: PackedBatch, loss: TokenNPO | ChunkLoss, together: int
) -> tuple[Tensor, Tensor]:
    """A loss over the batch's targets with its gradient, in one pass over the head.

    Args:
        model: gives hidden states and head.
        batch: (R, T) tokens with N targets.
        loss: see `weighted_preference_loss`.
        together: how many neighbouring sequences `loss` needs at once.

    Returns:
        The sum of the loss, scalar with gradient, and the log-probs (N,) without one.
    """
    hidden, head = _head_inputs(model, batch)
    settings: Any = head_settings(model)
    groups = batch.target_offsets[::together]
    return _loss_and_logps(hidden, head, batch.target_ids, loss, groups=groups, **settings)


# Dynamo would trace the autograd of `loss`, chunk by chunk.
_loss_and_logps = torch.compiler.disable(weighted_preference_loss)
