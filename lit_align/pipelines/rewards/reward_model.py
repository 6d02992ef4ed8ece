"""The token reward model: how probable each token of a response is after the rewriting prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_align.data import TokenizedRow, TokenizedSequence, collate
from lit_align.errors import ModelError, TrainingError
from lit_align.evaluation.generation import evaluating
from lit_align.modules.forward import per_token_logps


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A model trained on the rewriting task, and how it is run.

    Attributes:
        model: any causal LM.
        tokenizer: with the policy's vocabulary, and the chat template it was trained with.
        max_length: most tokens of rewriting prompt and response, unless the model takes fewer.
        batch_size: responses scored at a time.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int = 2048
    batch_size: int = 8

    @property
    def longest(self) -> int:
        """Most tokens that can be scored at once."""
        config = self.model.config.get_text_config()
        most = getattr(config, "max_position_embeddings", None)  # some models have no limit
        return min(self.max_length, most or self.max_length)


def check_same_tokenizer(
    policy: PreTrainedTokenizerBase, reward_model: PreTrainedTokenizerBase
) -> None:
    """Make sure that token ids mean the same to policy and reward model.

    Raises:
        ModelError: another vocabulary or EOS token.
    """
    ours, theirs = policy.get_vocab(), reward_model.get_vocab()
    if ours != theirs:
        different = {token for token, _ in ours.items() ^ theirs.items()}
        raise ModelError(
            "token weights need one tokenizer for policy and reward model: their vocabularies "
            f"({len(ours)} and {len(theirs)} tokens) differ in {len(different)} tokens, such as "
            f"{min(different)!r}; train the reward model from a model with the policy's tokenizer, "
            "or use `edit`"
        )
    if policy.eos_token_id != reward_model.eos_token_id:
        raise ModelError(
            "token weights need one tokenizer for policy and reward model: they end a response "
            f"with {policy.eos_token!r} and {reward_model.eos_token!r}"
        )


def token_probabilities(
    sequences: Sequence[TokenizedSequence], reward_model: RewardModel, *, progress: bool = True
) -> list[np.ndarray]:
    """P(token | everything before it) of every response token.

    Args:
        sequences: rewriting prompts with the original responses.
        reward_model: asked without gradients and dropout.
        progress: show a bar.

    Returns:
        For each sequence (N,) fp32.

    Raises:
        TrainingError: a probability is NaN.
    """
    model, size = reward_model.model, reward_model.batch_size
    pad_id = int(reward_model.tokenizer.pad_token_id or 0)
    order = sorted(range(len(sequences)), key=lambda i: -sequences[i].num_tokens)
    found: dict[int, np.ndarray] = {}
    bar = tqdm(total=len(order), desc="token rewards", unit="response", disable=not progress)
    with evaluating(model), bar:
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            batch = collate([TokenizedRow(i, (sequences[i],)) for i in chosen], pad_id)
            logps = per_token_logps(model, batch.to(model.device))
            ends = np.cumsum([len(sequences[i].response_ids) for i in chosen])
            parts = np.split(logps.float().exp().cpu().numpy(), ends[:-1])
            found.update(zip(chosen, parts, strict=True))
            bar.update(len(chosen))
    if not all(np.isfinite(p).all() for p in found.values()):
        raise TrainingError("the reward model gives NaN token probabilities: its training failed")
    return [found[i] for i in range(len(sequences))]
