"""ALLO's noisy-token filter: which tokens of a response count in the improving stage."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

FilterSide = Literal["chosen", "rejected", "both"]


@dataclasses.dataclass(frozen=True)
class TokenFilter:
    """Leave out tokens by their reward Δ = log π − log π_ref, per response, over valid tokens.

    Exactly one of the two settings is given.

    Attributes:
        side: whose tokens are filtered.
        drop_fraction: the paper: tokens whose Δ is in the top share are noise and dropped.
        keep_fraction: the public code: only the share with the lowest Δ is kept.
    """

    side: FilterSide = "both"
    drop_fraction: float | None = None
    keep_fraction: float | None = None

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: neither or both fractions are given, or one lies outside (0, 1).
        """
        given = [f for f in (self.drop_fraction, self.keep_fraction) if f is not None]
        if len(given) != 1 or not 0 < given[0] < 1:
            raise ValueError("give one of drop_fraction and keep_fraction, in (0, 1)")
        if self.side not in ("chosen", "rejected", "both"):
            raise ValueError(f"side {self.side!r}: choose chosen, rejected or both")

    def _kept(self, valid: int) -> int:
        if self.drop_fraction is not None:
            return valid - int(self.drop_fraction * valid)
        assert self.keep_fraction is not None
        return max(1, int(self.keep_fraction * valid))

    @torch.no_grad()
    def weights(
        self,
        rewards: Tensor,
        sequence_index: Tensor,
        is_rejected: Tensor,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Q of every token: 1 counts, 0 is left out.

        A token is kept where its Δ is at most the k-th lowest of its response, so ties are kept: at
        step 0, where every Δ is 0, nothing is dropped.

        Args:
            rewards: (N,) Δ of every target.
            sequence_index: (N,) int64 in [0, S).
            is_rejected: (S,) bool.
            valid: (N,) bool, tokens that take part; None for all. Another token's q is 1.

        Returns:
            (N,) fp32 of 0 and 1. Example: Δ (0.1, 0.9, 0.5, 0.2) with drop_fraction 0.25 →
            (1, 0, 1, 1); with keep_fraction 0.25 → (1, 0, 0, 0).
        """
        keep = torch.ones_like(rewards, dtype=torch.float32)
        for sequence, rejected in enumerate(is_rejected.tolist()):
            if self.side != "both" and (self.side == "rejected") != rejected:
                continue
            takes_part = sequence_index == sequence
            at = (takes_part if valid is None else takes_part & valid).nonzero()[:, 0]
            if at.numel():
                threshold = rewards[at].kthvalue(self._kept(at.numel())).values
                keep[at] = (rewards[at] <= threshold).float()
        return keep
