"""Rows of a cache as policies see them, and what they receive of an attention matrix, with plain loops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.runtime.cache_policies.base import CachePolicy, Decision, Rows

Array = npt.NDArray[Any]


def attention(tokens: int, heads: int, seed: int) -> Array:
    """Return causal attention weights of a prompt, float64 [T, heads, T], uneven as those of trained models are."""
    generator = np.random.default_rng(seed)
    scores = 5 * generator.standard_normal((tokens, heads, tokens))
    weights = np.zeros_like(scores)
    for query in range(tokens):
        for head in range(heads):
            seen = np.exp(scores[query, head, : query + 1])
            weights[query, head, : query + 1] = seen / seen.sum()
    return weights


def received(policy: CachePolicy, weights: Array, calls: list[int]) -> Array | None:
    """Return what rows have received after these calls, float32 [S]: the op's formulas, with loops.

    Args:
        policy: what observes.
        weights: attention of every query to every row, [T, heads, T].
        calls: tokens of each; their sum is T.
    """
    if policy.observe is None:
        return None
    values = np.zeros(0, np.float32)
    start = 0
    for tokens in calls:
        positions = np.arange(start, start + tokens)[None]
        query_weight, decay = policy.weights(positions, positions + 1)
        assert query_weight.dtype == decay.dtype == np.float32
        assert query_weight.shape == (1, tokens) and decay.shape == (1,)
        new = np.zeros(start + tokens, np.float32)
        for row in range(start + tokens):
            value = float(values[row]) if row < start else (0.0 if policy.observe == "mass" else -1.0)
            if policy.observe == "mass":
                value *= float(decay[0])
            for t in range(tokens):
                for head in range(weights.shape[1]):
                    mass = float(query_weight[0, t]) * weights[start + t, head, row]
                    if policy.observe == "mass":
                        value += mass
                    elif mass >= 1:
                        value = max(value, start + t)
            new[row] = value
        values, start = new, start + tokens
    return values


def prompt_rows(policy: CachePolicy, weights: Array, calls: list[int], layers: int = 1, layer: int = 0) -> Rows:
    """Return the rows of a prompt that nothing was evicted from."""
    tokens = len(weights)
    budgets = policy.budgets(layers)
    return Rows(
        layer=layer,
        budget=None if budgets is None else int(budgets[layer]),
        length=tokens,
        positions=np.arange(tokens),
        received=received(policy, weights, calls),
        counts=np.ones(tokens, np.float32),
    )


def permuted(rows: Rows, order: Array) -> Rows:
    """Return the same rows in another order."""
    return replace(
        rows,
        positions=rows.positions[order],
        received=None if rows.received is None else rows.received[order],
        counts=rows.counts[order],
    )


def kept(rows: Rows, decision: Decision) -> set[int]:
    """Return the positions of the rows that stay."""
    return set(rows.positions[decision.keep].tolist())
