"""Switch a model's attention to packed documents, where it does the same as for padded rows."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from lit_align.errors import ModelError
from lit_align.modules.decoder import decoder_of, hidden_states
from lit_align.modules.document_attention import (
    NAME_PREFIX,
    ORDINARY,
    USE_PADDED,
    DocumentLayout,
    Documents,
)

# Of the check: a prefix with two branches, and a document that must not see them.
DOCUMENTS: Documents = ((4, 3, 2), (3,))
SEQUENCES = ((0, 1, 2, 3, 4, 5, 6), (0, 1, 2, 3, 7, 8), (9, 10, 11))  # places in the packed row


def is_enabled(model: PreTrainedModel) -> bool:
    """Whether the model's attention takes documents."""
    return str(decoder_of(model).config._attn_implementation).startswith(NAME_PREFIX)


def enable_shared_prefix(model: PreTrainedModel) -> None:
    """Let a model's attention take `PackedBatch.documents`; its other calls stay as they are.

    Checked on a few tokens: log-probs of a made-up pair are those of its padded sequences.

    Raises:
        ModelError: the model cannot be called so; names the architecture and the way out. It is
            left as it was.
    """
    if is_enabled(model):
        return
    _refuse_by_config(model)
    before = decoder_of(model).config._attn_implementation
    model.set_attn_implementation(NAME_PREFIX + before)
    training = model.training
    try:
        _check(model.eval())
    except ModelError:
        model.set_attn_implementation(before)
        raise
    finally:
        model.train(training)


def _refuse_by_config(model: PreTrainedModel) -> None:
    config = decoder_of(model).config
    if config._attn_implementation not in ORDINARY:
        _refuse(model, f"with attn_implementation {config._attn_implementation}")
    others = sorted(set(_layer_types(config)) - {"full_attention", "sliding_attention"})
    if others:
        _refuse(model, f"with layers of type {', '.join(others)}")
    if getattr(config, "attention_chunk_size", None) is not None:
        _refuse(model, "with chunks of attention")


def _layer_types(config: Any) -> list[str]:
    return getattr(config, "layer_types", None) or []


@torch.no_grad()
def _check(model: PreTrainedModel) -> None:
    """Compare log-probs of a made-up packed row with those of its padded sequences."""
    if not is_enabled(model):
        _refuse(model, "whose attention does not go through transformers' AttentionInterface")
    row = torch.arange(sum(map(sum, DOCUMENTS)), device=model.device)
    places = pad_sequence([row[list(sequence)] for sequence in SEQUENCES], True, padding_value=-1)
    # Spread over the vocabulary, where neighbours may be reserved tokens that mean nothing.
    ids = ((row + 1) * 7919).remainder(model.config.get_text_config().vocab_size)
    real = places >= 0
    positions = torch.arange(places.shape[1], device=row.device).expand_as(places)
    packed_positions = torch.zeros_like(row).scatter(0, places[real], positions[real])
    layout = DocumentLayout(DOCUMENTS, row.device)
    try:
        packed = hidden_states(
            model, ids[None], torch.ones_like(row)[None], packed_positions[None], layout
        )
        padded = hidden_states(model, ids[places], real.long(), positions)
    except (TypeError, ValueError, RuntimeError) as error:
        _refuse(model, f"whose decoder does not take it ({error})")
    _check_windows(model, layout.windows)
    head: Any = model.get_output_embeddings()
    expected, found = head(padded[real]).float(), head(packed[0][places[real]]).float()
    # The mean over the vocabulary: in 16 bits a single log-prob's rounding may be large.
    difference = expected.log_softmax(-1).sub(found.log_softmax(-1)).abs().mean(-1).max()
    allowed = 1e-4 + torch.finfo(padded.dtype).eps * float(expected.abs().max())
    if not difference <= allowed and bool(expected.isfinite().all()):
        _refuse(model, f"whose log-probs would differ by {difference:.3g} nats")


def _check_windows(model: PreTrainedModel, found: list[int | None]) -> None:
    """Every layer's attention is reached, and knows its window."""
    config = decoder_of(model).config
    window = getattr(config, "sliding_window", None)
    types = _layer_types(config) or ["sliding_attention"] * config.num_hidden_layers
    expected = [window if kind == "sliding_attention" else None for kind in types]
    if len(found) != len(expected):
        _refuse(model, f"in which {len(found)} of {len(expected)} layers' attention take it")
    if found != expected:
        _refuse(model, f"whose attention is not told its sliding window of {window} positions")


def _refuse(model: PreTrainedModel, why: str) -> NoReturn:
    raise ModelError(
        f"layout shared_prefix does not suit {type(model).__name__}, {why}: {USE_PADDED}"
    )
