"""What a mask says about itself, beside the selection."""

from __future__ import annotations

import dataclasses
from typing import Any

from lit_align.errors import MaskError

FORMAT_VERSION = 1
_TYPES: dict[str, tuple[type, ...]] = {
    "format_version": (int,),
    "base_fingerprint": (str, type(None)),
    "method": (str,),
    "granularity": (str,),
    "ratio": (int, float, type(None)),
    "realised_ratio": (int, float),
    "scope": (str, type(None)),
    "extra": (dict,),
}


@dataclasses.dataclass(frozen=True)
class MaskMetadata:
    """Where a mask comes from.

    Attributes:
        method: how the entries were chosen, such as `weight_change`.
        granularity: `element`, `row`, `head` or `layer`; `mixed` after set algebra over two kinds.
        ratio: the ratio asked for; None where none was (set algebra, a hand-made mask).
        scope: `global` or `per_parameter`; None where nothing was ranked.
        base_fingerprint: of the model the mask was located on; None: unknown.
        realised_ratio: selected / all entries; `ParameterMask` fills it in.
        extra: anything else that JSON can hold, such as the threshold of the scores.
        format_version: of the file.
    """

    method: str = "manual"
    granularity: str = "element"
    ratio: float | None = None
    scope: str | None = None
    base_fingerprint: str | None = None
    realised_ratio: float = 0.0
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for name, types in _TYPES.items():
            value = getattr(self, name)
            if not isinstance(value, types) or isinstance(value, bool):
                raise MaskError(f"metadata field {name!r} has the wrong type: {value!r}")
        if self.format_version != FORMAT_VERSION:
            raise MaskError(
                f"format version {self.format_version} of a mask; this lit-align reads "
                f"version {FORMAT_VERSION}"
            )


def combine(a: MaskMetadata, b: MaskMetadata, symbol: str) -> MaskMetadata:
    """Metadata of `a symbol b`.

    Raises:
        MaskError: the masks were located on two different models.
    """
    if None not in (a.base_fingerprint, b.base_fingerprint) and (
        a.base_fingerprint != b.base_fingerprint
    ):
        raise MaskError(
            f"masks of two base models cannot be combined: {a.base_fingerprint} and "
            f"{b.base_fingerprint}"
        )
    return MaskMetadata(
        method=f"({a.method} {symbol} {b.method})",
        granularity=a.granularity if a.granularity == b.granularity else "mixed",
        base_fingerprint=a.base_fingerprint or b.base_fingerprint,
    )


def complement(a: MaskMetadata) -> MaskMetadata:
    """Metadata of `~a`."""
    return MaskMetadata(
        method=f"~{a.method}", granularity=a.granularity, base_fingerprint=a.base_fingerprint
    )
