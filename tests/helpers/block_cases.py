"""Inputs of the attention kernels with a cache in blocks of 32 rows, and what should come out.

Written from the formulas alone (numbers in float32 to the bit, attention in float64), with nothing of the package.
"""

from __future__ import annotations

import numpy as np

from gta_edge.plugins.attention.tiling import Variant
from tests.helpers import attention_cases as cases

Array = np.ndarray

BLOCK = 32
VALUE_BITS = {"int4": 4, "int4v2": 2}


def quantised(values: Array, bits: int) -> tuple[Array, Array, Array]:
    """Codes of groups along the last axis, float32 [..., N], with each group's float16 scale and minimum [...]."""
    levels = 2**bits - 1
    with np.errstate(invalid="ignore", over="ignore"):
        low, high = values.min(-1), values.max(-1)
        step = (high - low) * np.float32(2.0**-bits)
        scale = np.maximum(step, np.float32(2.0**-24)).astype(np.float16)
        minimum = (low + step * np.float32(0.5)).astype(np.float16)
        bad = ~(np.isfinite(scale) & np.isfinite(minimum))
        scale, minimum = (np.where(bad, np.float16(np.nan), x) for x in (scale, minimum))
        inverse = np.float32(1) / scale.astype(np.float32)
        codes = np.rint((values - minimum.astype(np.float32)[..., None]) * inverse[..., None])
    codes = np.where(bad[..., None], 0, np.clip(codes, 0, levels))
    return codes.astype(np.uint8), scale, minimum


def packed(codes: Array, bits: int) -> Array:
    """Codes [..., N] as bytes [..., N · bits / 8]: units of 16 bytes, in 8 words, word w with values w, w + 8, ..."""
    per_word = 16 // bits
    units = codes.reshape(*codes.shape[:-1], -1, per_word, 8).astype(np.uint16)
    words = np.zeros((*units.shape[:-2], 8), np.uint16)
    for n in range(per_word):
        words |= units[..., n, :] << np.uint16(bits * n)
    return words.astype("<u2").view(np.uint8).reshape(*codes.shape[:-1], -1)


def stored(history: dict[str, Array], lengths: Array, of: Variant) -> dict[str, Array]:
    """The cache after so many rows of each sequence's history, float32 [B, n, S, d]; NaN and junk elsewhere."""
    dtype, bits = cases.TYPES[of.compute], VALUE_BITS[of.cache]
    rng = np.random.default_rng(5)
    key, latent = history["key"], history["latent"]
    (batch, n_k, s, d_k), (_, n_c, _, d_l) = key.shape, latent.shape
    nan = np.float16(np.nan)
    arrays = {
        "key_cache": rng.integers(0, 256, (batch, n_k, s // BLOCK, d_k, 16), np.uint8),
        "latent_cache": rng.integers(0, 256, (batch, n_c, s, d_l * bits // 8), np.uint8),
        "key_scale": np.full((batch, n_k, s // BLOCK, 2, d_k), nan),
        "latent_scale": np.full((batch, n_c, s, 2), nan),
        "key_open": np.full((batch, n_k, BLOCK, d_k), np.nan, dtype),
        "latent_open": np.full((batch, n_c, BLOCK, d_l), np.nan, dtype),
    }
    for row, length in enumerate(lengths):
        for block in range(length // BLOCK):
            rows = slice(block * BLOCK, (block + 1) * BLOCK)
            codes, scale, minimum = quantised(key[row, :, rows].swapaxes(1, 2), 4)  # [n_k, d_k, 32]
            arrays["key_cache"][row, :, block] = packed(codes, 4)
            arrays["key_scale"][row, :, block] = np.stack([scale, minimum], 1)
            codes, scale, minimum = quantised(latent[row, :, rows], bits)  # [n_c, 32, d_l]
            arrays["latent_cache"][row, :, rows] = packed(codes, bits)
            arrays["latent_scale"][row, :, rows] = np.stack([scale, minimum], -1)
        for place in range(max(0, length - BLOCK), length):
            arrays["key_open"][row, :, place % BLOCK] = key[row, :, place]
            arrays["latent_open"][row, :, place % BLOCK] = latent[row, :, place]
    return arrays


def make(
    of: Variant,
    lengths: tuple[int, ...],
    tokens: int,
    capacity: int,
    seed: int = 0,
    quarter_turns: bool = False,
) -> tuple[cases.Case, dict[str, Array]]:
    """Return a case of random inputs, and the history that its cache is made of: of new rows too.

    Keys that are turned by ``quarter_turns`` are exact, fused operations or not.
    """
    plain = cases.make(Variant(of.sizes, of.compute, of.compute), lengths, tokens, capacity, seed)
    rng = np.random.default_rng(seed + 1)
    if quarter_turns:
        places, channels = (np.arange(n) for n in plain.arrays["cos"].shape)
        turns = places[:, None] * (channels + 1) % 4
        for table, values in (("cos", [1, 0, -1, 0]), ("sin", [0, 1, 0, -1])):
            plain.arrays[table] = np.array(values)[turns].astype(plain.arrays[table].dtype)
    history = {}
    for name, heads, width in (
        ("key", of.sizes.num_key_heads, of.sizes.key_dim),
        ("latent", of.sizes.num_latent_heads, of.sizes.latent_dim),
    ):
        values = rng.standard_normal((len(lengths), heads, capacity, width)) + rng.standard_normal(width)
        values *= rng.choice([0.03, 1.0, 4.0], (len(lengths), heads, 1, 1))
        history[name] = values.astype(cases.TYPES[of.compute]).astype(np.float32)
    case = cases.Case(of, lengths, tokens, capacity, plain.scale, plain.arrays)
    history = with_new_rows(case, history)
    case.arrays |= stored(history, cases.held(case), of)
    return case, history


def with_new_rows(case: cases.Case, history: dict[str, Array]) -> dict[str, Array]:
    """The history with a call's rows in their places, as the compute type holds them; what does not fit is dropped."""
    sizes, dtype = case.variant.sizes, cases.TYPES[case.variant.compute]
    held = cases.held(case)
    history = {name: values.copy() for name, values in history.items()}
    shape = (case.batch, case.tokens, sizes.num_key_heads, 2, sizes.key_dim // 2)
    a, b = np.moveaxis(case.arrays["key"].astype(np.float32).reshape(shape), 3, 0)
    places = np.minimum(held[:, None] + np.arange(case.tokens), len(case.arrays["cos"]) - 1)
    cos, sin = (case.arrays[table].astype(np.float32)[places][:, :, None] for table in ("cos", "sin"))
    with np.errstate(invalid="ignore"):
        key = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)  # in float32, as the kernels turn it
    latent = case.arrays["latent"].astype(np.float32).reshape(case.batch, case.tokens, sizes.num_latent_heads, -1)
    for name, values in (("key", key), ("latent", latent)):
        for row, start in enumerate(held):
            count = min(case.tokens, case.capacity - start)
            history[name][row, :, start : start + count] = values[row, :count].astype(dtype).swapaxes(0, 1)
    return history


def read(values: Array, bits: int) -> Array:
    """Groups along the last axis as they are read from their codes: one rounding to float16; float64."""
    codes, scale, minimum = quantised(values, bits)
    exact = codes * scale.astype(np.float64)[..., None] + minimum.astype(np.float64)[..., None]
    with np.errstate(over="ignore"):
        return exact.astype(np.float16).astype(np.float64)


def read_rows(values: Array, name: str, of: Variant) -> Array:
    """Keys or latents [..., S, d] as they are read from their codes, S a multiple of 32."""
    blocks = values.reshape(*values.shape[:-2], -1, BLOCK, values.shape[-1])
    if name == "key":
        return read(blocks.swapaxes(-1, -2), 4).swapaxes(-1, -2).reshape(values.shape)
    return read(blocks, VALUE_BITS[of.cache]).reshape(values.shape)


def attended(case: cases.Case, history: dict[str, Array]) -> Array:
    """The output, float64 [B, T, H]: row s from its codes for the query of row p iff s // 32 < p // 32."""
    sizes = case.variant.sizes
    query = cases.rotated(case, "query", sizes.num_query_heads).astype(np.float16).astype(np.float64)
    output = np.zeros((case.batch, case.tokens, sizes.num_query_heads, sizes.latent_dim))
    for row, start in enumerate(cases.held(case)):
        whole = (start + min(case.tokens, case.capacity - start)) // BLOCK * BLOCK
        exact, coded = {}, {}
        for name in ("key", "latent"):
            values = history[name][row]
            with np.errstate(over="ignore"):
                exact[name] = values.astype(np.float16).astype(np.float64)
            coded[name] = read_rows(values[:, :whole], name, case.variant)
        for t in range(min(case.tokens, case.capacity - start)):
            border = (start + t) // BLOCK * BLOCK
            seen = {n: np.concatenate([coded[n][:, :border], exact[n][:, border : start + t + 1]], 1) for n in exact}
            for head in range(sizes.num_query_heads):
                keys = seen["key"][head * sizes.num_key_heads // sizes.num_query_heads]
                scores = keys @ query[row, head, t] * case.scale
                weights = np.exp(scores - scores.max())
                mix = weights @ seen["latent"][head * sizes.num_latent_heads // sizes.num_query_heads]
                output[row, t, head] = mix / weights.sum()
    mixes = output.transpose(0, 2, 1, 3)  # [B, n_q, T, d_l]
    if sizes.has_value_decoder:
        decoder = case.arrays["value_decoder"].astype(np.float64)
        mixes = np.tile(mixes, case.variant.expansion) + mixes @ decoder
    joined = mixes.transpose(0, 2, 1, 3).reshape(case.batch, case.tokens, -1)
    if sizes.has_gate:
        joined = joined / (1 + np.exp(-case.arrays["gate"].astype(np.float64)))
    return joined


def rows_of_cache(arrays: dict[str, Array]) -> dict[str, Array]:
    """What a cache consists of."""
    return {name: a for name, a in arrays.items() if name.endswith(("_cache", "_scale", "_open"))}


def same(found: Array, expected: Array) -> bool:
    """Whether all bits are the same, NaN counting as NaN."""
    if found.dtype == np.uint8:
        return bool((found == expected).all())
    found, expected = found.astype(np.float32), expected.astype(np.float32)
    return bool(((found.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(found) & np.isnan(expected))).all())


def present(case: cases.Case) -> Array:
    """Rows of each sequence after the call."""
    return np.minimum(cases.held(case) + case.tokens, case.capacity)


def check(case: cases.Case, history: dict[str, Array]) -> None:
    """Compare a case after a call: the cache bit for bit, the output with float64."""
    for name, expected in stored(history, present(case), case.variant).items():
        assert same(case.arrays[name], expected), name
    real = cases.held(case)[:, None] + np.arange(case.tokens) < case.capacity
    expected = attended(case, history)[real]
    if expected.size:
        error = cases.error(case.arrays["output"][real], expected)
        assert error <= cases.TOLERANCE[case.variant.compute], error
