"""Losses: pure functions of log-probs, each with its equation and source."""

from lit_align.losses.dpo import DPOLossType, check_dpo_settings, dpo_loss
from lit_align.losses.logps import sequence_lengths, sequence_logps
from lit_align.losses.npo import npo_loss, token_npo_losses, token_weighted_npo_loss
from lit_align.losses.sft import sft_loss
from lit_align.losses.token_filter import TokenFilter

__all__ = [
    "DPOLossType",
    "TokenFilter",
    "check_dpo_settings",
    "dpo_loss",
    "npo_loss",
    "sequence_lengths",
    "sequence_logps",
    "sft_loss",
    "token_npo_losses",
    "token_weighted_npo_loss",
]
