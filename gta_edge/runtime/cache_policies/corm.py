"""What any recent query found important (CORM, arXiv 2404.15949): the method decides how many rows stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from gta_edge.runtime.cache_policies.base import CachePolicy, Floats, Integers, Rows, check_whole
from gta_edge.runtime.cache_policies.ranking import by_importance, received

__all__ = ["CORM"]


@dataclass(frozen=True, kw_only=True)
class CORM(CachePolicy):
    """Keep the newest tokens, and every row that one of their queries gave at least its share in any head.

    A query's share is 1/n, n being the rows that it sees, in the mean over the layers. What a row has received is the
    position of the last query that gave it as much, so one number a row stands for the paper's window of bits. The
    paper decides for each head alone; a row here is shared by all heads of a layer, and stays where one of them wants
    it.

    Args:
        rows: None evicts whatever is not important. A number evicts once there are more rows than that, and is an upper
            bound: where more are important, those stay that were important last.
        window: newest tokens, whose queries are asked and which stay: the paper's w, and its r, which are equal there.
            16 keeps about a third of the rows on the shipped model; the paper's 256 is for longer contexts.
        residual_rows: one lowers the perplexity of the shipped model by 0.03 at a window of 16; the paper has none.
    """

    name: ClassVar[str] = "corm"
    needs_rows: ClassVar[bool] = False

    residual_rows: int = 1
    window: int = 16

    def __post_init__(self) -> None:
        check_whole(self, "window", least=1)
        super().__post_init__()

    @property
    def observe(self) -> Literal["last"]:
        return "last"

    def weights(self, positions: Integers, visible: Integers) -> tuple[Floats, Floats]:
        return visible.astype(np.float32), np.ones(len(positions), np.float32)

    def _ordered(self, rows: Rows) -> Integers:
        important = received(rows) >= rows.length - self.window
        recent = rows.age < self.window
        ordered = by_importance(rows, recent, received(rows))
        newest = ordered[:1]
        return np.concatenate([newest, ordered[1:][(recent | important)[ordered[1:]]]])
