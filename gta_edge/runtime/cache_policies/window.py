"""Sinks and a recent window (StreamingLLM, arXiv 2309.17453): the first few tokens and the newest stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gta_edge.runtime.cache_policies.base import CachePolicy, Integers, Rows, check_whole
from gta_edge.runtime.cache_policies.ranking import by_importance

__all__ = ["Window"]


@dataclass(frozen=True, kw_only=True)
class Window(CachePolicy):
    """Keep the first tokens and the newest. Nothing is observed.

    Positions are those that the tokens had: the paper renumbers rows, which gains nothing where positions end far off.

    Args:
        sinks: first tokens that stay, which Llama models attend to whatever they hold; the paper's 4. GTA shows no
            sink on the shipped model, where 0 is as good.
    """

    name: ClassVar[str] = "window"

    sinks: int = 4

    def __post_init__(self) -> None:
        check_whole(self, "sinks", least=0)
        super().__post_init__()

    @property
    def least_rows(self) -> int:
        return self.sinks + super().least_rows

    @property
    def observe(self) -> None:
        return None

    def _ordered(self, rows: Rows) -> Integers:
        return by_importance(rows, rows.positions < self.sinks)
