"""Heavy hitters (H2O, arXiv 2306.14048): what all queries so far attended to most stays, and a recent window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from gta_edge.runtime.cache_policies.base import CachePolicy, Integers, Rows, check_share
from gta_edge.runtime.cache_policies.ranking import received, recent_then

__all__ = ["H2O"]


@dataclass(frozen=True, kw_only=True)
class H2O(CachePolicy):
    """Keep the newest tokens, and of the others those with the largest sum of attention, over queries and heads.

    The sum goes over all heads of a layer, since a row is shared by them; the paper decides for each head alone.

    Args:
        recent: share of the rows that goes to the newest tokens; the paper's half.
    """

    name: ClassVar[str] = "h2o"

    recent: float = 0.5

    def __post_init__(self) -> None:
        check_share(self, "recent")
        super().__post_init__()

    @property
    def observe(self) -> Literal["mass"]:
        return "mass"

    def _ordered(self, rows: Rows) -> Integers:
        return recent_then(rows, self.recent, received(rows))
