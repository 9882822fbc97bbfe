"""The attention with a managed cache in NumPy float64: explicit loops, from the formulas, without the package."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.helpers.reference import Array, double, rotate, sigmoid


@dataclass(frozen=True)
class Attended:
    """What one call gives.

    `weights` are those of the softmax, [B, T, n_q, S]. `received` is None where nothing is observed, and NaN in the
    rows that hold nothing.
    """

    output: Array
    present_key: Array
    present_latent: Array
    weights: Array
    received: Array | None


def is_seen(
    row: int, query: int, past: int, tokens: int, branch_start: int | None = None, words: Array | None = None
) -> bool:
    """Whether a new token looks at a row of the cache."""
    if branch_start is None or words is None or tokens > 64:
        return row <= past + query
    if row >= past + tokens:
        return False
    if row < branch_start:
        return True
    place = row - branch_start
    return place < len(words) and bool((int(words[place]) % 2**64) // 2**query % 2)


def managed_attention(
    query: Array,
    key: Array,
    latent: Array,
    gate: Array | None,
    past_key: Array,
    past_latent: Array,
    past_length: Array,
    cos: Array,
    sin: Array,
    value_decoder: Array | None,
    positions: Array | None = None,
    row_bias: Array | None = None,
    branch_start: Array | None = None,
    branches: Array | None = None,
    past_received: Array | None = None,
    query_weight: Array | None = None,
    decay: Array | None = None,
    *,
    num_query_heads: int,
    num_key_heads: int,
    num_latent_heads: int,
    scale: float,
    observe: str | None = None,
) -> Attended:
    """One call of the op; an input that is None is absent."""
    query, key, latent, cos, sin = (double(x) for x in (query, key, latent, cos, sin))
    present_key, present_latent = double(past_key).copy(), double(past_latent).copy()
    (batch, tokens, _), (capacity, d_k), d_l = query.shape, past_key.shape[2:], past_latent.shape[3]
    width = d_l if value_decoder is None else value_decoder.shape[2]
    output = np.zeros((batch, tokens, num_query_heads * width))
    weights = np.zeros((batch, tokens, num_query_heads, capacity))
    for b in range(batch):
        past = int(past_length[b])
        places = [past + t if positions is None else int(positions[b, t]) for t in range(tokens)]
        for t in range(tokens):  # all are written before any looks: in a tree a token may see a later row
            for k in range(num_key_heads):
                head = key[b, t, k * d_k : (k + 1) * d_k]
                present_key[b, k, past + t] = rotate(head, cos[places[t]], sin[places[t]])
            for c in range(num_latent_heads):
                present_latent[b, c, past + t] = latent[b, t, c * d_l : (c + 1) * d_l]
        for t in range(tokens):
            branch = (None, None) if branches is None or branch_start is None else (int(branch_start[b]), branches[b])
            seen = [s for s in range(capacity) if is_seen(s, t, past, tokens, *branch)]
            for q in range(num_query_heads):
                k, c = q // (num_query_heads // num_key_heads), q // (num_query_heads // num_latent_heads)
                turned = rotate(query[b, t, q * d_k : (q + 1) * d_k], cos[places[t]], sin[places[t]])
                scores = {}
                for s in seen:
                    bias = float(row_bias[b, s]) if row_bias is not None and s < row_bias.shape[1] else 0.0
                    scores[s] = scale * float(turned @ present_key[b, k, s]) + bias
                powers = {s: np.exp(score - max(scores.values())) for s, score in scores.items()}
                mixed = np.zeros(d_l)
                for s in seen:
                    weights[b, t, q, s] = powers[s] / sum(powers.values())
                    mixed += weights[b, t, q, s] * present_latent[b, c, s]
                value = (
                    mixed if value_decoder is None else np.tile(mixed, width // d_l) + mixed @ double(value_decoder[q])
                )
                own = slice(q * width, (q + 1) * width)
                output[b, t, own] = value if gate is None else value * sigmoid(double(gate[b, t, own]))
    received = None
    if past_received is not None and query_weight is not None and decay is not None:
        where = positions if positions is not None else past_length[:, None] + np.arange(tokens)
        received = _received(weights, past_length, where, double(past_received), query_weight, decay, observe)
    return Attended(output, present_key, present_latent, weights, received)


def _received(
    weights: Array,
    past_length: Array,
    positions: Array,
    before: Array,
    query_weight: Array,
    decay: Array,
    observe: str | None,
) -> Array:
    batch, tokens, heads, _ = weights.shape
    received = np.full(before.shape, np.nan)
    for b in range(batch):
        past = int(past_length[b])
        for s in range(past + tokens):
            if observe == "mass":
                value = float(decay[b]) * before[b, s] if s < past else 0.0
                for t in range(tokens):
                    value += float(query_weight[b, t]) * weights[b, t, :, s].sum()
            else:
                value = before[b, s] if s < past else -1.0
                for t in range(tokens):
                    if any(float(query_weight[b, t]) * weights[b, t, q, s] >= 1 for q in range(heads)):
                        value = max(value, float(positions[b, t]))
            received[b, s] = value
    return received
