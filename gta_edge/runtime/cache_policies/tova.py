"""What the last query attends to (TOVA, arXiv 2401.06104)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from gta_edge.runtime.cache_policies.base import CachePolicy, Floats, Integers, Rows
from gta_edge.runtime.cache_policies.ranking import by_importance, received, recent_weights

__all__ = ["TOVA"]


@dataclass(frozen=True, kw_only=True)
class TOVA(CachePolicy):
    """Keep the rows that the last query attends to most, in the mean over the heads of a layer.

    There is no recent window. The newest token stays, which the paper leaves to its score.
    """

    name: ClassVar[str] = "tova"

    @property
    def observe(self) -> Literal["mass"]:
        return "mass"

    def weights(self, positions: Integers, visible: Integers) -> tuple[Floats, Floats]:
        return recent_weights(visible, 1)

    def _ordered(self, rows: Rows) -> Integers:
        return by_importance(rows, received(rows))
