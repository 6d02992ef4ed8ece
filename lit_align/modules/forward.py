"""From a batch to per-token log-probs: the decoder's hidden states, the head on targets only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_align.batch import PackedBatch
from lit_align.compact import head_handle
from lit_align.errors import ModelError
from lit_align_kernels.token_logprobs import (
    TokenStatistics,
    token_logprobs,
    token_logprobs_with_statistics,
)


def target_hidden(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """The hidden states that predict the batch's targets: (N, D)."""
    decoder: Any = model.get_decoder()
    if decoder is None or decoder is model:
        raise ModelError(f"{type(model).__name__} has no decoder beneath its head")
    output = decoder(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    )
    return output.last_hidden_state.flatten(0, 1).index_select(0, batch.hidden_index)


def head_settings(model: PreTrainedModel) -> dict[str, float | None]:
    """How this model scales and caps its logits (Cohere, Granite, Gemma 2 and 3)."""
    config = model.config.get_text_config()
    scale: float = getattr(config, "logit_scale", None) or 1.0
    scaling: float = getattr(config, "logits_scaling", None) or 1.0
    return {
        "logit_scale": scale / scaling,
        "soft_cap": getattr(config, "final_logit_softcapping", None),
    }


def scaled_logits(model: PreTrainedModel, logits: Tensor) -> Tensor:
    """What the model makes of its head's product (..., V): scaled, then capped."""
    settings: Any = head_settings(model)
    logits = logits * settings["logit_scale"]
    cap = settings["soft_cap"]
    return logits if cap is None else cap * torch.tanh(logits / cap)


def per_token_logps(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Log-probs of the batch's targets: (N,) fp32, nats."""
    head = head_handle(model.get_output_embeddings())
    settings: Any = head_settings(model)
    return token_logprobs(target_hidden(model, batch), head, batch.target_ids, **settings)


def per_token_logps_with_statistics(
    model: PreTrainedModel, batch: PackedBatch
) -> tuple[Tensor, TokenStatistics]:
    """The same, and entropy, argmax hits and mean logit of each target's distribution."""
    head = head_handle(model.get_output_embeddings())
    settings: Any = head_settings(model)
    hidden = target_hidden(model, batch)
    return token_logprobs_with_statistics(hidden, head, batch.target_ids, **settings)
