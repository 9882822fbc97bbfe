"""What many times become: percentiles, and how far repeats lie apart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

__all__ = ["percentile", "relative", "settled", "spread", "summarise"]

_SETTLED = 0.03


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least ``share`` (above 0, up to 1) of all values do not exceed: nearest rank.

    Raises:
        ValueError: no values, or a share outside of that.
    """
    if not values or not 0 < share <= 1:
        raise ValueError(f"{len(values)} values and the share {share}: expected one value, and a share in (0, 1]")
    return sorted(values)[math.ceil(share * len(values)) - 1]


def spread(values: Sequence[float]) -> float | None:
    """Return how far apart repeats lie, (largest - smallest) / median; None of fewer than two."""
    if len(values) < 2:
        return None
    middle = statistics.median(values)
    return (max(values) - min(values)) / middle if middle else None


def settled(values: Sequence[float]) -> bool:
    """Tell whether repeats have a mean that more of them would hardly move: its standard error is below 3% of it."""
    if len(values) < 2:
        return False
    return statistics.stdev(values) <= _SETTLED * math.sqrt(len(values)) * statistics.fmean(values)


def relative(values: Sequence[float], others: Sequence[float]) -> dict[str, float] | None:
    """Return how many times the others' each value is, round by round: ``median``, ``low``, ``high``; None of none.

    What slows a machine for a while slows both sides of a round, so this holds better than either side.
    """
    ratios = [value / other for value, other in zip(values, others, strict=False) if other > 0]
    if not ratios:
        return None
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def summarise(rounds: Sequence[dict[str, Any]], context: int, batch: int) -> dict[str, Any]:
    """Return times and rates over all rounds of one context.

    Args:
        rounds: of each ``ttft_ms`` and ``steps_ms``, milliseconds of every single step.
        context: tokens of the prompt, per row.
        batch: rows.

    Returns:
        ``ttft_ms`` is the median of the rounds, ``tpot_ms`` percentiles over all steps of all rounds, rates are tokens
        of all rows per second of those medians, ``spread`` is between the rounds; ``per_round`` has each round's
        ``ttft_ms`` and the median of its steps as ``tpot_ms``, in the order of the rounds.
    """
    first = [entry["ttft_ms"] for entry in rounds]
    steps = [step for entry in rounds for step in entry["steps_ms"]]
    middles = [percentile(entry["steps_ms"], 0.5) for entry in rounds]
    ttft, middle = statistics.median(first), percentile(steps, 0.5)
    return {
        "ttft_ms": ttft,
        "prefill_tokens_per_s": 1e3 * batch * context / ttft,
        "tpot_ms": {"p50": middle, "p90": percentile(steps, 0.9), "p99": percentile(steps, 0.99)},
        "decode_tokens_per_s": 1e3 * batch / middle,
        "spread": {"ttft": spread(first), "tpot": spread(middles)},
        "per_round": {"ttft_ms": first, "tpot_ms": middles},
        "rounds": len(rounds),
        "steps": len(steps),
    }
