"""How policies order rows and weigh queries: what several of them share."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.runtime.cache_policies.base import Floats, Integers, Mask, Rows

__all__ = ["by_importance", "fading_weights", "newest_rows", "received", "recent_then", "recent_weights"]


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


def ages(visible: Integers) -> tuple[Integers, Integers]:
    """Return by how much each query of a call is older than its sequence's newest, and how many are no padding.

    Args:
        visible: as ``CachePolicy.weights`` takes it, int64 [B, T].

    Returns:
        int64 [B, T], negative for padding, and int64 [B].
    """
    tokens = (visible > 0).sum(1)
    return tokens[:, None] - 1 - np.arange(visible.shape[1]), tokens


def fading_weights(visible: Integers, decay: float) -> tuple[Floats, Floats]:
    """Return the weights and decays of one call for sums that fade: ``decay`` to the power of a query's age.

    Args:
        visible: as ``CachePolicy.weights`` takes it, int64 [B, T].
        decay: from 0 to 1, per token.

    Returns:
        ``query_weight`` float32 [B, T] and ``decay`` float32 [B].
    """
    age, tokens = ages(visible)
    weights = np.where(age < 0, 0, np.power(decay, np.maximum(age, 0)))  # 0**0 is 1
    return weights.astype(np.float32), np.power(decay, tokens).astype(np.float32)


def recent_weights(visible: Integers, window: int, last: float = 1.0) -> tuple[Floats, Floats]:
    """Return the weights and decays of one call for what the last ``window`` queries attended to.

    A call of at least as many tokens counts its last ones, and forgets what was before. In a shorter one, as are all
    while tokens are generated, queries count by their age, as an exponential average of that span does: (w-1)/(w+1) to
    the power of the age, whose mean age is that of the window.

    Args:
        visible: as ``CachePolicy.weights`` takes it, int64 [B, T].
        window: queries that count (w).
        last: weight of the newest query where the oldest that counts has 1, with a ramp between.

    Returns:
        ``query_weight`` float32 [B, T] and ``decay`` float32 [B].
    """
    age, tokens = ages(visible)
    ramp = 1 + (last - 1) * (window - 1 - age) / max(1, window - 1)
    weights = np.where((age >= 0) & (age < window), ramp, 0).astype(np.float32)
    fading, decay = fading_weights(visible, (window - 1) / (window + 1))
    whole = tokens >= window
    return np.where(whole[:, None], weights, fading), np.where(whole, np.float32(0), decay)
