"""The change of a linear layer as a product of two narrow matrices."""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The change of one linear layer that an adapter makes: ΔW = scale · b @ a.

    Attributes:
        a: (r, in).
        b: (out, r).
        scale: alpha / r, as the adapter applies it.
    """

    a: Tensor
    b: Tensor
    scale: float
