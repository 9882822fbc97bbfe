"""Caches whose rows are moved, folded and rotated, and what should come of it, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.helpers.attention_cases import CODES, LARGEST, TYPES, quantise

Array = np.ndarray
DIMS = {"gta": ((1, 64), (1, 128)), "gqa": ((3, 64), (3, 64)), "narrow": ((2, 16), (5, 256))}
"""Heads and width of keys, and of latents."""


@dataclass
class Layer:
    """Arrays of one layer: key and latent [B, n, S, d], their scales [B, n, S], and received [B, S]."""

    arrays: dict[str, Array] = field(default_factory=dict)

    @property
    def capacity(self) -> int:
        return int(self.arrays["key"].shape[2])

    def value(self, name: str) -> Array:
        """What a cache holds, float64 [B, n, S, d]."""
        values = self.arrays[name].astype(np.float64)
        scale = self.arrays.get(f"{name}_scale")
        return values if scale is None else values * scale.astype(np.float64)[..., None]


def layers(
    dims: str, compute: str, cache: str, capacities: Sequence[int], batch: int, received: bool, seed: int = 0
) -> list[Layer]:
    """Random caches."""
    rng, made = np.random.default_rng(seed), []
    for capacity in capacities:
        layer = Layer()
        for name, (heads, width) in zip(("key", "latent"), DIMS[dims], strict=True):
            values = rng.standard_normal((batch, heads, capacity, width)) * rng.choice(
                [0.1, 1, 5], (batch, heads, 1, 1)
            )
            if cache in CODES:
                layer.arrays[name], layer.arrays[f"{name}_scale"] = quantise(values, cache)
            else:
                layer.arrays[name] = values.astype(TYPES[compute])
        if received:
            layer.arrays["received"] = rng.uniform(0, 5, (batch, capacity)).astype(np.float32)
        made.append(layer)
    return made


def lines(rng: np.random.Generator, capacities: Sequence[int], batch: int) -> tuple[Array, Array, Array]:
    """Moves, folds and the folds' weights, of rows that are each a target once, or sources."""
    moves: list[tuple[int, int, int, int]] = []
    folds: list[tuple[int, int, int, int]] = []
    weights: list[float] = []
    for layer, capacity in enumerate(capacities):
        for sequence in range(batch):
            rows = rng.permutation(capacity)
            a, b = (int(n) for n in rng.integers(0, capacity // 3, 2))
            moves += [(layer, sequence, int(s), int(t)) for s, t in zip(rows[:a], rows[a : 2 * a], strict=True)]
            rest = rows[2 * a :]
            for target in rest[: min(2, b)]:
                chosen = [target, *rng.choice(rest[2:], min(b, len(rest) - 2), replace=False)]
                share = rng.dirichlet(np.ones(len(chosen)))
                folds += [(layer, sequence, int(source), int(target)) for source in chosen]
                weights += share.tolist()
    shaped = (np.array(each, np.int32).reshape(-1, 4) for each in (moves, folds))
    return *shaped, np.array(weights, np.float32)


def moved(layer: Layer, index: int, moves: Array) -> dict[str, Array]:
    """A layer's arrays after the moves: the same bits elsewhere."""
    result = {name: array.copy() for name, array in layer.arrays.items()}
    for of, b, source, target in moves.tolist():
        if of == index:
            for name, array in result.items():
                if name == "received":
                    array[b, target] = layer.arrays[name][b, source]
                else:
                    array[b, :, target] = layer.arrays[name][b, :, source]
    return result


def folded(layer: Layer, index: int, folds: Array, weights: Array) -> dict[str, Array]:
    """What key and latent hold after the folds, float64; NaN in rows that are no targets."""
    result = {}
    for name in ("key", "latent"):
        before = layer.value(name)
        sums = np.full(before.shape, np.nan)
        for (of, b, source, target), weight in zip(folds.tolist(), weights.tolist(), strict=True):
            if of == index:
                own = np.nan_to_num(sums[b, :, target])
                sums[b, :, target] = own + (weight * before[b, :, source] if weight else 0)
        result[name] = sums
    return result


def allowed(values: Array, compute: str, cache: str) -> Array:
    """How far a row that was written may be from ``values`` [..., d]."""
    largest = np.abs(values).max(-1, keepdims=True)
    if cache == "int8":
        return largest / LARGEST[cache] * 0.501 + 1e-6
    if cache == "fp8":
        return np.maximum(np.abs(values) * 2.0**-4, largest / LARGEST[cache] * 2.0**-10) * 1.01 + 1e-6
    return np.abs(values) * (2.0**-11 if compute == "fp16" else 2.0**-8) + 1e-6 * largest + 1e-7
