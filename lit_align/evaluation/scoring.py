"""Log-probs of given responses: each prompt is read once for all of its responses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lit_align.errors import DataError
from lit_align.evaluation.decoding_state import PromptReader
from lit_align.evaluation.generation import evaluating


def response_logps(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[Sequence[int]]],
    *,
    pad_id: int,
    batch_size: int = 16,
    progress: bool = True,
) -> list[list[Tensor]]:
    """Per-token log-probs of several responses to each prompt.

    Args:
        model: any causal LM.
        prompts: token ids of each prompt.
        responses: for each prompt, token ids of its responses.
        pad_id: fills up rows; never seen by the model.
        batch_size: prompts at a time.
        progress: show a bar that counts prompts.

    Returns:
        For each prompt, for each of its responses, an fp32 tensor with one log-prob a token (nats).

    Raises:
        DataError: A response has no tokens.
    """
    if any(not response for group in responses for response in group):
        raise DataError("a response has no tokens to be scored")
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    scored: dict[int, list[Tensor]] = {}
    bar = tqdm(total=len(order), desc="scoring", unit="prompt", disable=not progress)
    with evaluating(model), bar:
        reader = PromptReader(model, prompts, pad_id)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            groups = [responses[i] for i in chosen]
            logps = _score(reader, [prompts[i] for i in chosen], groups)
            scored.update(zip(chosen, logps, strict=True))
            bar.update(len(chosen))
    return [scored[i] for i in range(len(prompts))]


def _score(
    reader: PromptReader,
    prompts: Sequence[Sequence[int]],
    groups: Sequence[Sequence[Sequence[int]]],
) -> list[list[Tensor]]:
    """`response_logps` of one batch."""
    state = reader.read(prompts)
    device = state.logits.device
    flat = [torch.tensor(response) for group in groups for response in group]
    rows = [row for row, group in enumerate(groups) for _ in group]
    state.repeat(torch.tensor(rows, device=device))
    targets = torch.nn.utils.rnn.pad_sequence(flat, batch_first=True, padding_value=reader.pad_id)
    lengths = torch.tensor([response.numel() for response in flat])
    attention_mask = (torch.arange(targets.shape[1]) < lengths[:, None]).long().to(device)
    targets = targets.to(device)
    first = _logps(state.logits[:, None], targets[:, :1])
    logps = first
    if targets.shape[1] > 1:
        logits = state.feed(targets[:, :-1], attention_mask[:, :-1])
        logps = torch.cat([first, _logps(logits, targets[:, 1:])], dim=1)
    parts = iter(logps[row, :length].cpu() for row, length in enumerate(lengths.tolist()))
    return [[next(parts) for _ in group] for group in groups]


def _logps(logits: Tensor, targets: Tensor) -> Tensor:
    """(R, T) log-probs of targets (R, T) under logits (R, T, V), in fp32."""
    chosen = logits.gather(-1, targets[..., None]).squeeze(-1).float()
    return chosen - logits.float().logsumexp(-1)
