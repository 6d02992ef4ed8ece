"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, eq. 7) and variants."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

DPOLossType = Literal["sigmoid", "hinge", "ipo", "robust"]


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: DPOLossType = "sigmoid",
) -> tuple[Tensor, Tensor, Tensor]:
    """DPO losses of B pairs.

    With h = (log π_c − log π_r) − (log π_ref,c − log π_ref,r), ε = label_smoothing:

        sigmoid  −(1 − ε)·logσ(βh) − ε·logσ(−βh)                         (cDPO where ε > 0)
        robust   [−(1 − ε)·logσ(βh) + ε·logσ(−βh)] / (1 − 2ε)            (arXiv 2403.00409)
        hinge    max(0, 1 − βh)                                          (SLiC, arXiv 2305.10425)
        ipo      (h − 1 / (2β))²                                         (arXiv 2310.12036, eq. 17;
                 its logps are means over a response's tokens, as in TRL)

    By hand: logps −1, −3 (policy) and −2, −2 (reference) give h = 2; at β = 0.5 the sigmoid loss is
    ln(1 + e⁻¹) = 0.3133, hinge 0, ipo (2 − 1)² = 1, rewards 0.5 and −0.5.

    Args:
        policy_chosen_logps: (B,) nats.
        policy_rejected_logps: (B,).
        ref_chosen_logps: (B,).
        ref_rejected_logps: (B,).
        beta: strength of the pull towards the reference, > 0.
        label_smoothing: share of labels taken to be wrong, in [0, 0.5).
        loss_type: see above.

    Returns:
        (losses, chosen_rewards, rejected_rewards), each (B,); rewards are β·(log π − log π_ref),
        detached.

    Raises:
        ValueError: unknown loss type, beta or label_smoothing out of range, or smoothing asked of a
            loss that has none.
    """
    check_dpo_settings(beta, label_smoothing, loss_type)
    chosen = policy_chosen_logps - ref_chosen_logps
    rejected = policy_rejected_logps - ref_rejected_logps
    losses = _losses(chosen - rejected, beta, label_smoothing, loss_type)
    return losses, beta * chosen.detach(), beta * rejected.detach()


def check_dpo_settings(beta: float, label_smoothing: float, loss_type: str) -> None:
    """Check what `dpo_loss` takes.

    Raises:
        ValueError: see `dpo_loss`.
    """
    if not beta > 0 or not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"beta {beta} must be > 0 and label_smoothing {label_smoothing} in [0, 0.5)"
        )
    if loss_type not in get_args(DPOLossType):
        raise ValueError(f"loss_type {loss_type!r}: choose sigmoid, hinge, ipo or robust")
    if label_smoothing and loss_type in ("hinge", "ipo"):
        raise ValueError(f"loss_type {loss_type} has no label smoothing")


def _losses(h: Tensor, beta: float, smoothing: float, loss_type: DPOLossType) -> Tensor:
    right, wrong = F.logsigmoid(beta * h), F.logsigmoid(-beta * h)
    if loss_type == "sigmoid":
        return -(1 - smoothing) * right - smoothing * wrong
    if loss_type == "robust":
        return (-(1 - smoothing) * right + smoothing * wrong) / (1 - 2 * smoothing)
    if loss_type == "hinge":
        return F.relu(1 - beta * h)
    return (h - 1 / (2 * beta)) ** 2
