"""How policies order rows and weigh queries: what several of them share."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.runtime.cache_policies.base import Floats, Integers, Mask, Rows

__all__ = ["by_importance", "newest_rows", "received", "recent_then", "recent_weights"]


def received(rows: Rows) -> Floats:
    """Return what the rows received, float32 [n], of a policy that observes."""
    assert rows.received is not None  # a session gives what ``observe`` asks for
    return rows.received


def by_importance(rows: Rows, *importance: npt.NDArray[Any]) -> Integers:
    """Return the indices of the rows that are no residual rows, the most important first.

    Args:
        rows: of one layer of one sequence.
        importance: arrays [n], the first counts most. Of what is equal in all, the newer token comes first; the newest
            of all comes first whatever its importance.
    """
    ordinary = np.flatnonzero(~rows.residual)
    positions = rows.positions[ordinary]
    newest = positions == positions.max(initial=-1)
    order = np.lexsort((positions, *(key[ordinary] for key in reversed(importance)), newest))
    return ordinary[order[::-1]]


def newest_rows(rows: Rows, count: int) -> Mask:
    """Return which rows hold the ``count`` newest tokens, bool [n], residual rows left out."""
    chosen = np.zeros(len(rows), np.bool_)
    chosen[by_importance(rows)[:count]] = True
    return chosen


def recent_then(rows: Rows, share: float, score: npt.NDArray[Any]) -> Integers:
    """Return the indices of the rows that are no residual rows: a recent window first, then by score.

    Args:
        rows: of one layer of one sequence, with a budget.
        share: of the budget, that goes to the newest tokens.
        score: of each row, [n].
    """
    assert rows.budget is not None  # of policies that need ``rows``
    return by_importance(rows, newest_rows(rows, int(share * rows.budget)), score)


def recent_weights(batch: int, tokens: int, window: int, last: float = 1.0) -> tuple[Floats, Floats]:
    """Return the weights and decays of one call for what the last ``window`` queries attended to.

    A call of at least as many tokens counts its last ones, and forgets what was before. In a shorter one, as are all
    while tokens are generated, queries count by their age, as an exponential average of that span does: (w-1)/(w+1) to
    the power of the age, whose mean age is that of the window.

    Args:
        batch: sequences (B).
        tokens: of the call, per sequence (T).
        window: queries that count (w).
        last: weight of the newest query where the oldest that counts has 1, with a ramp between.

    Returns:
        ``query_weight`` float32 [B, T] and ``decay`` float32 [B].
    """
    if tokens >= window:
        ramp = np.linspace(1, last, window) if window > 1 else np.ones(1)
        weight, decay = np.concatenate([np.zeros(tokens - window), ramp]), 0.0
    else:
        fading = (window - 1) / (window + 1)
        weight, decay = np.power(fading, np.arange(tokens - 1, -1, -1)), fading**tokens
    return np.tile(weight.astype(np.float32), (batch, 1)), np.full(batch, decay, np.float32)
