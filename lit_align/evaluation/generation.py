"""Generate responses to many prompts, as fast as two CPU cores allow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_align.errors import ModelError
from lit_align.evaluation.decoding_state import PromptReader
from lit_align.evaluation.next_token import draw, uniform_numbers
from lit_align.evaluation.prompts import Prompt, encode_prompt


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_samples: int = 1,
    batch_size: int = 64,
    seed: int = 0,
    keys: Sequence[str] | None = None,
    progress: bool = True,
) -> list[list[str]]:
    """Responses to every prompt: `num_samples` each, in the order of the prompts.

    What makes it fast: prompts of like length side by side, their common beginning read once, a
    prompt read once for all its samples, keys and values written in place, finished responses
    leaving the batch. A response depends on the seed, the prompt's place in the list and the
    sample's number, not on its batch (but for the rounding of matrix products of another size).

    Args:
        model: any causal LM; it is put back into the mode (training or not) it was in.
        tokenizer: its tokenizer.
        prompts: texts, chat messages or token ids.
        max_new_tokens: most tokens of a response.
        temperature: 0 is greedy: then all samples of a prompt are the same, generated once.
        top_p: nucleus; 1 keeps the whole distribution.
        num_samples: responses a prompt.
        batch_size: responses generated at a time.
        seed: of the draws.
        keys: one for each prompt, on which its draws depend in place of its place in the list.
        progress: show a bar that counts responses.

    Raises:
        ModelError: A setting out of its range.
        DataError: A prompt that cannot be encoded.
    """
    if max_new_tokens < 1 or num_samples < 1 or batch_size < 1 or temperature < 0:
        raise ModelError("max_new_tokens, num_samples, batch_size must be >= 1, temperature >= 0")
    if not 0 < top_p <= 1:
        raise ModelError(f"top_p is {top_p}, not in (0, 1]")
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    draws = 1 if temperature == 0 else num_samples
    work = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(draws)]
    work.sort(key=lambda item: -len(encoded[item[0]]))
    stop_ids = _stop_ids(model, tokenizer)
    names = range(len(prompts)) if keys is None else keys
    responses: dict[tuple[int, int], str] = {}
    bar = tqdm(total=len(work), desc="generating", unit="response", disable=not progress)
    with evaluating(model), bar:
        reader = PromptReader(model, encoded, int(tokenizer.pad_token_id or 0))
        for start in range(0, len(work), batch_size):
            items = work[start : start + batch_size]
            uniform = torch.stack(
                [uniform_numbers(seed, names[p], sample, max_new_tokens) for p, sample in items]
            )
            batch = _Batch(reader, encoded, items, stop_ids)
            for row, ids in batch.run(uniform, temperature, top_p):
                responses[items[row]] = str(tokenizer.decode(ids, skip_special_tokens=True))
                bar.update()
    return [
        [responses[prompt, sample % draws] for sample in range(num_samples)]
        for prompt in range(len(prompts))
    ]


class _Batch:
    """Responses that are generated side by side, one for each (prompt, sample) of `items`."""

    def __init__(
        self,
        reader: PromptReader,
        encoded: Sequence[Sequence[int]],
        items: Sequence[tuple[int, int]],
        stop_ids: set[int],
    ):
        distinct = list(dict.fromkeys(prompt for prompt, _ in items))
        self.state = reader.read([encoded[prompt] for prompt in distinct])
        self.stop_ids = torch.tensor(sorted(stop_ids), device=self.state.logits.device)
        if len(items) > len(distinct):
            row_of = {prompt: row for row, prompt in enumerate(distinct)}
            rows = torch.tensor([row_of[prompt] for prompt, _ in items])
            self.state.repeat(rows.to(self.state.logits.device))

    def run(
        self, uniform: torch.Tensor, temperature: float, top_p: float
    ) -> Iterator[tuple[int, list[int]]]:
        """(item, token ids without the stop token) of each response, as it gets finished.

        Args:
            uniform: (items, max_new_tokens), the draws.
            temperature: see `generate`.
            top_p: see `generate`.
        """
        items = torch.arange(uniform.shape[0], device=self.state.logits.device)
        written: list[list[int]] = [[] for _ in items]
        for step in range(uniform.shape[1]):
            tokens = draw(self.state.logits, temperature, top_p, uniform[items.cpu(), step])
            finished = torch.isin(tokens, self.stop_ids)
            ended = finished.tolist()
            for item, token, end in zip(items.tolist(), tokens.tolist(), ended, strict=True):
                if end:
                    yield item, written[item]
                else:
                    written[item].append(token)
            if all(ended):
                return
            if any(ended):
                order = self.state.drop(finished)
                items, tokens = items[order], tokens[order]
            if step + 1 < uniform.shape[1]:
                self.state.feed(tokens[:, None])
        yield from ((item, written[item]) for item in items.tolist())


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Without gradients and dropout; afterwards the model is in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        # Not inference_mode: a tensor that a module keeps would then be of no use in training.
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokenizer's end-of-sequence token and those that the model's generation config names."""
    config = getattr(model, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    return {int(i) for i in ids if i is not None}
