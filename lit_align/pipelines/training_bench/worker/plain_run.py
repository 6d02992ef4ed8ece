"""DPO in plain torch, with a second model for the reference; AdamW, or its dense masked kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lit_align.batch import IGNORE_INDEX
from lit_align.language_model import load_language_model
from lit_align.masks import ParameterMask
from lit_align.pipelines.training_bench.job import Job, Result
from lit_align.pipelines.training_bench.worker.dense_masked_adamw import DenseMaskedAdamW
from lit_align.pipelines.training_bench.worker.pair_file import Pair, read_pairs
from lit_align.pipelines.training_bench.worker.watch import Watch, state_bytes, tensor_bytes


def run(job: Job, folder: Path, watch: Watch) -> Result:
    """Train, save model and optimiser, say what it took."""
    device = torch.device(job.device)
    policy, reference = (_model(job, device) for _ in range(2))
    policy.train()
    reference.requires_grad_(False)
    optimizer = _optimizer(job, policy)
    pairs, logps = read_pairs(job), []
    watch.start()
    for at in range(0, job.num_pairs, job.pairs_per_step):
        input_ids, attention_mask, labels = _batch(pairs[at : at + job.pairs_per_step], device)
        with torch.no_grad():
            ref_logps = _sequence_logps(reference, input_ids, attention_mask, labels)
        loss = _dpo_loss(
            _sequence_logps(policy, input_ids, attention_mask, labels), ref_logps, job.beta
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), job.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        watch.step(loss.detach())
        logps += torch.stack(ref_logps.chunk(2), 1).tolist()
    masks = getattr(optimizer, "masks", {})
    return watch.result(
        trained_parameters=_trained_parameters(job, policy),
        optimizer_bytes=state_bytes(optimizer),
        mask_bytes=tensor_bytes(masks.values()),
        checkpoint=_save(policy, optimizer, folder / "checkpoint") if job.saves else None,
        reference_logps=logps,
    )


def _model(job: Job, device: torch.device) -> Any:
    model, _ = load_language_model(job.model)
    return torch.nn.Module.to(model, device)


def _optimizer(job: Job, policy: Any) -> torch.optim.Optimizer:
    settings: Any = {
        "lr": job.learning_rate,
        "betas": job.betas,
        "eps": job.eps,
        "weight_decay": job.weight_decay,
    }
    if job.mask is None:
        return torch.optim.AdamW(policy.parameters(), **settings)
    selections = ParameterMask.load(job.mask).selections
    masks = {name: s.dense().to(torch.bfloat16) for name, s in selections.items()}
    return DenseMaskedAdamW(dict(policy.named_parameters()), masks, **settings)


def _trained_parameters(job: Job, policy: Any) -> int:
    if job.mask is not None:
        return ParameterMask.load(job.mask).count()
    return sum(p.numel() for p in policy.parameters())


def _save(policy: Any, optimizer: torch.optim.Optimizer, folder: Path) -> Path:
    policy.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return folder


def _batch(pairs: list[Pair], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Input ids, attention mask and labels, each (2P, T): all chosen, then all rejected."""
    ids, labels = [], []
    for side in ("chosen_ids", "rejected_ids"):
        for pair in pairs:
            prompt, response = torch.tensor(pair["prompt_ids"]), torch.tensor(pair[side])
            ids.append(torch.cat([prompt, response]))
            labels.append(torch.cat([torch.full_like(prompt, IGNORE_INDEX), response]))
    input_ids = pad_sequence(ids, batch_first=True)
    attention_mask = pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
    padded = pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)
    return input_ids.to(device), attention_mask.to(device), padded.to(device)


def _sequence_logps(
    model: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
) -> Tensor:
    """(2P,) log-probs of the responses."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    targets = labels[:, 1:]
    logps = logits[:, :-1].log_softmax(-1)
    logps = logps.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (logps * (targets != IGNORE_INDEX)).sum(-1)


def _dpo_loss(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """−log σ(β·((π_c − ref_c) − (π_r − ref_r))), the mean over pairs."""
    chosen, rejected = (logps - ref_logps).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()
