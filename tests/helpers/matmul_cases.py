"""Inputs of the matmuls with quantised weights, and what should come out, in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from gta_edge.model.config import GTAConfig, ModelConfig
from gta_edge.plugins.matmul.packing import pack
from gta_edge.plugins.matmul.tiling import Variant

Array = np.ndarray

TYPES = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
TOLERANCE = {"fp16": 2e-3, "bf16": 1e-2}
"""Of each output: largest error over the largest magnitude."""
ROUNDING = {"fp16": 2.0**-11, "bf16": 2.0**-8}

VARIANTS = {
    f"int{bits}, {f'blocks of {block}' if block else 'per channel'}, {compute}": Variant(bits, block, compute)
    for bits, blocks in ((4, (32, 64, 128)), (8, (0, 32, 64, 128)))
    for block in blocks
    for compute in ("fp16", "bf16")
}


@dataclass
class Case:
    """Arrays by the names that the kernels' parameters have, and the weights as numbers."""

    variant: Variant
    codes: Array
    """int8 [K, N]"""
    scales: Array
    """float16 [K/block_size, N], or [N]"""
    output_sizes: tuple[int, ...]
    arrays: dict[str, Array] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return len(self.arrays["x"])

    @property
    def outputs(self) -> list[Array]:
        return [self.arrays[f"output_{i}"] for i in range(len(self.output_sizes))]

    def numbers(self) -> dict[str, int]:
        sizes = (*self.output_sizes, 0, 0, 0)[:4]
        return {"rows": self.rows, "in_features": len(self.codes), **{f"size_{i}": n for i, n in enumerate(sizes)}}


def make(
    of: Variant,
    rows: int,
    in_features: int,
    output_sizes: tuple[int, ...],
    *,
    seed: int = 0,
    bias: bool = False,
    codes: Array | None = None,
    scales: Array | None = None,
    x: Array | None = None,
) -> Case:
    """Random inputs, where none are given; outputs start as NaN."""
    rng, out_features = np.random.default_rng(seed), sum(output_sizes)
    dtype = TYPES[of.compute]
    if codes is None:
        low = -(2 ** (of.bits - 1))
        codes = rng.integers(low, -low, (in_features, out_features)).astype(np.int8)
    if scales is None:
        shape = (in_features // of.block_size, out_features) if of.block_size else (out_features,)
        scales = (rng.uniform(0.5, 2, shape) * rng.choice([0.001, 0.1], shape)).astype(np.float16)
    if x is None:
        x = rng.standard_normal((rows, in_features))
    packed = pack(codes, scales, of.bits, of.block_size)
    arrays: dict[str, Any] = {"x": x.astype(dtype), "weight": packed.weight, "scale": packed.scale}
    if bias:
        arrays["bias"] = rng.standard_normal(out_features).astype(dtype)
    for i, size in enumerate(output_sizes):
        arrays[f"output_{i}"] = np.full((rows, size), np.nan, dtype)
    return Case(of, codes, scales, tuple(output_sizes), arrays)


def expected(case: Case) -> list[Array]:
    """The outputs, unrounded: float64 [rows, size] each."""
    repeats = case.variant.block_size or len(case.codes)
    scales = np.repeat(np.atleast_2d(case.scales.astype(np.float64)), repeats, axis=0)
    y = case.arrays["x"].astype(np.float64) @ (case.codes * scales)
    if "bias" in case.arrays:
        y += case.arrays["bias"].astype(np.float64)
    return np.split(y, np.cumsum(case.output_sizes)[:-1], axis=1)


def error(found: Array, wanted: Array) -> float:
    """Largest difference over the largest magnitude expected."""
    found = found.astype(np.float64)
    return float(np.abs(found - wanted).max() / np.abs(wanted).max()) if np.isfinite(found).all() else np.inf


def packed_by_definition(codes: Array, scales: Array, bits: int, block_size: int) -> tuple[Array, Array]:
    """The packed weight and scale, word by word as the layout is defined; for comparison only."""
    k, n = codes.shape
    spans, tiles = -(-k // 128), -(-n // 16)
    whole = np.zeros((128 * spans, 16 * tiles), np.int64)
    whole[:k, :n] = codes
    width = 64 if bits == 4 else 32
    weight = np.zeros((tiles, 128 * spans // width, 32, 4), np.uint32)
    for lane, word, i in np.ndindex(32, 4, 8 if bits == 4 else 4):
        g, t = divmod(lane, 4)
        if bits == 4:
            odd, k8, h, step = i // 4, i // 2 % 2, i % 2, word
        else:
            odd, k8, h, step = i % 2, word % 2, i // 2, word // 2
        part = whole[16 * step + 8 * k8 + 2 * t + odd :: width, 8 * h + g :: 16] + 2 ** (bits - 1)  # [tile_k, tile_n]
        weight[:, :, lane, word] |= (part.T << bits * i).astype(np.uint32)
    blocks = 128 // block_size if block_size else 1
    rows = np.atleast_2d(scales)
    scale = np.zeros((tiles, spans if block_size else 1, 8, blocks, 2), np.float16)
    for row, output in np.ndindex(rows.shape):
        scale[output // 16, row // blocks, output % 8, row % blocks, output % 16 // 8] = rows[row, output]
    return weight.view(np.int32), scale


def matmuls(config: ModelConfig) -> dict[int, list[tuple[int, ...]]]:
    """By the inputs of a model's matmuls, the outputs of each that is one call."""
    hidden, inner = config.hidden_size, config.intermediate_size
    if isinstance(config, GTAConfig):
        query, key = config.num_query_heads * config.key_dim, config.num_key_heads * config.key_dim
        attention = (query, key, config.num_latent_heads * config.latent_dim, hidden)
    else:
        attention = (hidden, config.cache_values_per_token_per_layer // 2, config.cache_values_per_token_per_layer // 2)
    return {hidden: [attention, (hidden,), (inner, inner), (config.vocab_size,)], inner: [(hidden,)]}
