"""Inputs of the attention kernels in their own types, and what should come out, in float64.

Written from the op's definition for whole arrays at once; ``reference.py`` beside it has the same in explicit loops.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from gta_edge.plugins.attention.definition import Sizes
from gta_edge.plugins.attention.tiling import Variant

Array = np.ndarray

TYPES = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
CODES = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}
LARGEST = {"int8": 127.0, "fp8": 448.0}
TOLERANCE = {"fp16": 2e-3, "bf16": 1e-2}
"""Of the output: largest error over the largest magnitude."""


def variant(heads: tuple[int, int, int], d_k: int, d_l: int, e: int, compute: str, cache: str | None = None) -> Variant:
    return Variant(Sizes(*heads, d_k, d_l, heads[0] * d_l * e), compute, cache or compute)


def grouped_query(
    n_q: int, n_kv: int, width: int, compute: str, cache: str | None = None, gate: bool = False
) -> Variant:
    """Without a value decoder; heads of keys and of values are as wide."""
    return Variant(Sizes(n_q, n_kv, n_kv, width, width, n_q * width, gate, False), compute, cache or compute)


def ungated(of: Variant) -> Variant:
    """The same without a gate."""
    return replace(of, sizes=replace(of.sizes, has_gate=False))


@dataclass
class Case:
    """Arrays by the names that the kernels' parameters have; none where the variant has no such input."""

    variant: Variant
    lengths: tuple[int, ...]
    tokens: int
    capacity: int
    scale: float
    arrays: dict[str, Array]

    @property
    def batch(self) -> int:
        return len(self.lengths)


def make(
    of: Variant, lengths: tuple[int, ...], tokens: int, capacity: int, seed: int = 0, sharpness: float = 1.0
) -> Case:
    """Random inputs. Cache rows that hold no token are NaN, so that reading one shows; output and workspace too."""
    rng, sizes, batch = np.random.default_rng(seed), of.sizes, len(lengths)
    dtype = TYPES[of.compute]
    n_q, n_k, n_c = sizes.num_query_heads, sizes.num_key_heads, sizes.num_latent_heads
    d_k, d_l = sizes.key_dim, sizes.latent_dim
    positions = capacity + 3
    angles = np.arange(positions)[:, None] / 100.0 ** (2 * np.arange(d_k // 2) / d_k)

    def normal(*shape: int, spread: float = 1.0) -> Array:
        return (rng.standard_normal(shape) * spread).astype(dtype)

    arrays = {
        "query": normal(batch, tokens, n_q * d_k, spread=sharpness),
        "key": normal(batch, tokens, n_k * d_k),
        "latent": normal(batch, tokens, n_c * d_l),
        "gate": normal(batch, tokens, sizes.hidden_size, spread=2.0),
        "past_length": np.array(lengths, np.int64),
        "cos": np.cos(angles).astype(dtype),
        "sin": np.sin(angles).astype(dtype),
        "value_decoder": normal(n_q, d_l, of.expansion * d_l, spread=d_l**-0.5),
        "output": np.full((batch, tokens, sizes.hidden_size), np.nan, dtype),
    }
    for name, given in (("gate", sizes.has_gate), ("value_decoder", sizes.has_value_decoder)):
        if not given:
            del arrays[name]
    for name, heads, width in (("key", n_k, d_k), ("latent", n_c, d_l)):
        values = rng.standard_normal((batch, heads, capacity, width)) * rng.choice(
            [0.03, 1.0, 4.0], (batch, heads, 1, 1)
        )
        codes, scales = quantise(values, of.cache) if of.quantised else (values.astype(dtype), None)
        for row, length in enumerate(lengths):
            held = max(0, min(length, capacity))
            if scales is None:
                codes[row, :, held:] = np.nan
            else:
                scales[row, :, held:] = np.nan
        arrays[f"{name}_cache"] = codes
        if scales is not None:
            arrays[f"{name}_scale"] = scales
    return Case(of, lengths, tokens, capacity, d_k**-0.5, arrays)


def quantise(values: Array, cache: str) -> tuple[Array, Array]:
    """Codes and float32 scales, one per token and head."""
    scales = (np.abs(values).max(-1) / LARGEST[cache]).astype(np.float32)
    codes = values / np.where(scales == 0, 1, scales)[..., None]
    return (np.rint(codes) if cache == "int8" else codes).astype(CODES[cache]), scales


def stored(case: Case, name: str) -> Array:
    """A cache as its codes and scales say, float64 [B, n, S, d]."""
    values = case.arrays[f"{name}_cache"].astype(np.float64)
    return values * case.arrays[f"{name}_scale"].astype(np.float64)[..., None] if case.variant.quantised else values


def rotated(case: Case, name: str, heads: int) -> Array:
    """Query or key after RoPE, float64 [B, n, T, d_k]."""
    x = case.arrays[name].astype(np.float64).reshape(case.batch, case.tokens, heads, -1).transpose(0, 2, 1, 3)
    last = len(case.arrays["cos"]) - 1
    places = np.clip(positions(case), 0, last)
    cos, sin = (case.arrays[table].astype(np.float64)[places][:, None] for table in ("cos", "sin"))
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def positions(case: Case) -> Array:
    """RoPE positions of the new tokens, [B, T], as they are given or follow on the cache's rows."""
    return case.arrays.get("token_positions", held(case)[:, None] + np.arange(case.tokens))


def held(case: Case) -> Array:
    """Tokens in each row's cache: what is outside of what is possible counts as the nearest possible."""
    return np.clip(np.array(case.lengths), 0, case.capacity)


def appended(case: Case, past: dict[str, Array]) -> dict[str, Array]:
    """Both caches after the call, float64: new rows unrounded, what would lie past the capacity dropped."""
    sizes = case.variant.sizes
    new = {"key": rotated(case, "key", sizes.num_key_heads)}
    latent = case.arrays["latent"].astype(np.float64)
    new["latent"] = latent.reshape(case.batch, case.tokens, sizes.num_latent_heads, -1).transpose(0, 2, 1, 3)
    present = {}
    for name, values in new.items():
        present[name] = past[name].copy()
        for row, start in enumerate(held(case)):
            count = min(case.tokens, case.capacity - start)
            present[name][row, :, start : start + count] = values[row, :, :count]
    return present


def visible(case: Case, row: int) -> Array:
    """Which rows of a sequence's cache each query sees, bool [T, S]."""
    start, rows = held(case)[row], np.arange(case.capacity)
    if "branches" not in case.arrays:
        return rows <= start + np.arange(case.tokens)[:, None]
    words = case.arrays["branches"][row]
    seen = np.zeros((case.tokens, case.capacity), bool)
    for s in range(min(start + case.tokens, case.capacity)):
        place = s - int(case.arrays["branch_start"][row])
        for t in range(case.tokens):
            seen[t, s] = place < 0 or (place < len(words) and int(words[place]) >> t & 1)
    return seen


def weights(case: Case, present: dict[str, Array]) -> list[Array]:
    """Attention of each sequence over its cache as it is after the call, float64 [n_q, T, S]; zeros of what sees none.

    The query that has been turned is rounded to the inputs' type, as the op's function has it: of keys that are large
    or nearly alike that alone changes the weights by a percent in bf16.
    """
    sizes = case.variant.sizes
    query = rotated(case, "query", sizes.num_query_heads).astype(case.arrays["query"].dtype).astype(np.float64)
    key = np.repeat(present["key"], sizes.num_query_heads // sizes.num_key_heads, axis=1)
    found = []
    for row in range(case.batch):
        seen = visible(case, row)
        used = seen.any(0)
        scores = np.full((sizes.num_query_heads, case.tokens, case.capacity), -np.inf)
        scores[:, :, used] = query[row] @ key[row][:, used].transpose(0, 2, 1) * case.scale
        if "row_bias" in case.arrays:
            bias = case.arrays["row_bias"][row].astype(np.float64)
            scores[:, :, : len(bias)] += bias[: case.capacity]
        scores = np.where(seen, scores, -np.inf)
        largest = scores.max(-1, keepdims=True)
        powers = np.exp(scores - np.where(np.isfinite(largest), largest, 0))
        sums = powers.sum(-1, keepdims=True)
        found.append(powers / np.where(sums > 0, sums, 1))
    return found


def attended(case: Case, present: dict[str, Array]) -> Array:
    """The output for caches as they are after the call, float64 [B, T, H]."""
    sizes = case.variant.sizes
    latent = np.repeat(present["latent"], sizes.num_query_heads // sizes.num_latent_heads, axis=1)
    output = np.empty((case.batch, case.tokens, sizes.hidden_size))
    for row, attention in enumerate(weights(case, present)):
        used = attention.any((0, 1))
        mix = attention[:, :, used] @ latent[row][:, used]  # [n_q, T, d_l]
        if sizes.has_value_decoder:
            mix = np.tile(mix, case.variant.expansion) + mix @ case.arrays["value_decoder"].astype(np.float64)
        output[row] = mix.transpose(1, 0, 2).reshape(case.tokens, -1)
        if sizes.has_gate:
            output[row] /= 1 + np.exp(-case.arrays["gate"][row].astype(np.float64))
    return output


def rounding(of: Variant, values: Array) -> Array:
    """How far a cached row may be from ``values`` [..., d]: half a step of its type, and a little for float32."""
    if of.cache == "int8":
        return np.abs(values).max(-1, keepdims=True) / 127 * 0.501 + 2.0**-60
    if of.cache == "fp8":  # 3 bits of mantissa; below 2^-6 of the scale, steps of 2^-9
        return (
            np.maximum(np.abs(values) * 2.0**-4, np.abs(values).max(-1, keepdims=True) / 448 * 2.0**-10) * 1.01
            + 2.0**-60
        )
    return np.abs(values) * (2.0**-11 if of.compute == "fp16" else 2.0**-8) + 1e-6


def error(found: Array, expected: Array) -> float:
    """Largest difference over the largest magnitude expected, or over 1 where nothing but zeros is."""
    found, largest = found.astype(np.float64), np.abs(expected).max()
    return float(np.abs(found - expected).max() / (largest or 1)) if np.isfinite(found).all() else np.inf
