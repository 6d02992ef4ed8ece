"""The decoder beneath a causal language model's head, called on padded or packed rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lit_align.errors import ModelError
from lit_align.modules.document_attention import DocumentLayout, longest


def decoder_of(model: PreTrainedModel) -> Any:
    """The model without its head.

    Raises:
        ModelError: it has none.
    """
    decoder: Any = model.get_decoder()
    if decoder is None or decoder is model:
        raise ModelError(f"{type(model).__name__} has no decoder beneath its head")
    return decoder


def hidden_states(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor,
    layout: DocumentLayout | None = None,
) -> Tensor:
    """The decoder's last hidden states: (R, T, D).

    Args:
        model: with `enable_shared_prefix`, where there is a layout.
        input_ids: (R, T).
        attention_mask: (R, T).
        position_ids: (R, T).
        layout: of packed documents; None: padded rows.

    Raises:
        ModelError: the model has no decoder, or fewer positions than a row has.
    """
    decoder = decoder_of(model)
    tokens = input_ids.shape[-1] if layout is None else longest(layout.documents)
    places = getattr(model.config, "n_positions", None)  # GPT-2 and kin, which learn an embedding
    if places is not None and tokens > places:
        raise ModelError(
            f"a row has {tokens} tokens and {type(model).__name__} {places} positions"
            f": set the data's max_length to {places} or less"
        )
    packed = {} if layout is None else {"documents": layout}
    if layout is not None:
        # Of four dimensions, so that no model makes its own masks; attention looks at the layout.
        attention_mask = attention_mask.bool()[:, None, None].expand(-1, 1, input_ids.shape[-1], -1)
    output = decoder(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=False,
        **packed,
    )
    return output.last_hidden_state
