"""Fewer rows the deeper the layer (PyramidInfer, arXiv 2405.12532)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from gta_edge.errors import InputError
from gta_edge.runtime.cache_policies.base import CachePolicy, Floats, Integers, Rows, check_share, check_whole
from gta_edge.runtime.cache_policies.budgets import shared_out
from gta_edge.runtime.cache_policies.ranking import by_importance, newest_rows, received, recent_weights
from gta_edge.support.choices import unknown

__all__ = ["SCHEDULES", "Pyramid"]

SCHEDULES = ("cosine", "linear", "constant")
"""How the share that a layer hands on to the next one falls with depth."""

_NEWEST = 1.2
"""Weight of the newest query, where the oldest that counts has 1: the published program's ``distance_weight``."""


@dataclass(frozen=True, kw_only=True)
class Pyramid(CachePolicy):
    """Keep what recent queries attend to most, the newest tokens and sinks, in fewer rows the deeper the layer.

    Scores and schedules are the paper's; its dropping of hidden states while the prompt runs is not here. Layer 0 has
    the most rows, and of L layers layer i hands on to the next one the share s_i of its rows:

        cosine    s_i = shrink + (1 - shrink) (1 + cos(pi i / L)) / 2
        linear    s_i = 1 - (1 - shrink) i / L
        constant  s_i = shrink

    ``rows`` is the mean over the layers. On the shipped model the same rows in every layer are better than fewer in
    the deeper ones.

    Args:
        sinks: first tokens that stay; the published program's 4.
        recent: share of the mean rows that goes to the newest tokens, whose queries give the scores; the published
            program has 0.2 of the tokens seen.
        shrink: as above; the published program's 0.9.
        schedule: one of ``SCHEDULES``; the published program's cosine.
    """

    name: ClassVar[str] = "pyramid"

    sinks: int = 4
    recent: float = 0.2
    shrink: float = 0.9
    schedule: str = "cosine"

    def __post_init__(self) -> None:
        check_whole(self, "sinks", least=0)
        check_share(self, "recent")
        check_share(self, "shrink")
        if self.schedule not in SCHEDULES:
            raise InputError(*unknown("cache policy pyramid: schedule is {}; give one of {}", self.schedule, SCHEDULES))
        super().__post_init__()

    @property
    def least_rows(self) -> int:
        return self.sinks + super().least_rows

    @property
    def observe(self) -> Literal["mass"]:
        return "mass"

    @property
    def _window(self) -> int:
        assert self.rows is not None
        return max(1, int(self.recent * self.rows))

    def budgets(self, layers: int) -> Integers:
        assert self.rows is not None
        shares = [1.0]
        for i in range(layers - 1):
            shares.append(shares[-1] * self._handed_on(i / layers))
        return shared_out(self.rows * layers, shares, self.least_rows)

    def _handed_on(self, depth: float) -> float:
        if self.schedule == "cosine":
            return self.shrink + (1 - self.shrink) * (1 + math.cos(math.pi * depth)) / 2
        return 1 - (1 - self.shrink) * depth if self.schedule == "linear" else self.shrink

    def weights(self, positions: Integers, visible: Integers) -> tuple[Floats, Floats]:
        return recent_weights(visible, self._window, _NEWEST)

    def _ordered(self, rows: Rows) -> Integers:
        kept = newest_rows(rows, self._window) | (rows.positions < self.sinks)
        return by_importance(rows, kept, received(rows))
