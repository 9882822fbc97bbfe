"""What the last few queries attend to (SnapKV, arXiv 2404.14469): they say which part of a prompt matters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from gta_edge.runtime.cache_policies.base import CachePolicy, Floats, Integers, Mask, Rows, check_whole
from gta_edge.runtime.cache_policies.ranking import by_importance, newest_rows, received, recent_weights

__all__ = ["SnapKV"]


@dataclass(frozen=True, kw_only=True)
class SnapKV(CachePolicy):
    """Keep an observation window of the newest tokens, and of the others those that its queries attended to most.

    The paper compresses the prompt alone, once. Here what is generated is evicted too; then queries count by their age
    (``recent_weights``).

    Args:
        window: newest tokens, whose queries observe and which stay (the paper: 16 to 64).
        pooling: neighbours in time, an odd number, whose largest score each row takes, so that what stays are
            stretches of text; 1 is none. The paper has 5 and 7; on the shipped model none is better.
    """

    name: ClassVar[str] = "snapkv"

    window: int = 32
    pooling: int = 1

    def __post_init__(self) -> None:
        check_whole(self, "window", least=1)
        check_whole(self, "pooling", least=1, odd=True)
        super().__post_init__()

    @property
    def observe(self) -> Literal["mass"]:
        return "mass"

    def weights(self, positions: Integers, visible: Integers) -> tuple[Floats, Floats]:
        return recent_weights(visible, self.window)

    def _ordered(self, rows: Rows) -> Integers:
        recent = newest_rows(rows, self.window)
        return by_importance(rows, recent, _pooled(rows, received(rows), ~recent & ~rows.residual, self.pooling))


def _pooled(rows: Rows, scores: Floats, context: Mask, size: int) -> Floats:
    """Return for each row of the context the largest of ``size`` scores around it in time."""
    pooled = scores.copy()
    in_time = np.flatnonzero(context)[np.argsort(rows.positions[context])]
    if size == 1 or not len(in_time):
        return pooled
    padded = np.pad(scores[in_time], size // 2, constant_values=-np.inf)
    pooled[in_time] = np.lib.stride_tricks.sliding_window_view(padded, size).max(-1)
    return pooled
