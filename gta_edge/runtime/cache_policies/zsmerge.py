"""Attention that fades, and residual rows for the rest (ZSMerge, arXiv 2503.10714)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from gta_edge.runtime.cache_policies.base import CachePolicy, Floats, Integers, Rows, check_share
from gta_edge.runtime.cache_policies.ranking import fading_weights, received, recent_then

__all__ = ["ZSMerge"]


@dataclass(frozen=True, kw_only=True)
class ZSMerge(CachePolicy):
    """Keep the newest tokens, those with the largest fading sum of attention, and the rest as residual rows.

    What a query gave counts ``decay`` to the power of its age. Sums go over all heads of a layer, since a row is shared
    by them; the paper decides for each head alone.

    Args:
        residual_rows: 1, as in the published program.
        decay: of what was received before, per token; the published program's 0.98.
        recent: share of the rows that goes to the newest tokens. 0.4 measured best on the shipped model; the published
            program has 0.1.
    """

    name: ClassVar[str] = "zsmerge"

    residual_rows: int = 1
    decay: float = 0.98
    recent: float = 0.4

    def __post_init__(self) -> None:
        check_share(self, "decay")
        check_share(self, "recent")
        super().__post_init__()

    @property
    def observe(self) -> Literal["mass"]:
        return "mass"

    def weights(self, positions: Integers, visible: Integers) -> tuple[Floats, Floats]:
        return fading_weights(visible, self.decay)

    def _ordered(self, rows: Rows) -> Integers:
        return recent_then(rows, self.recent, received(rows))
