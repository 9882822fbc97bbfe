"""Rows of torch's caches moved, folded and rotated on the CPU, against float64; those of 8 bits too."""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import pytest
import torch

from gta_edge.errors import BackendError
from gta_edge.plugins.cache.launches import turned_rows
from gta_edge.plugins.cache.torch import move_rows, rotate_keys
from gta_edge.plugins.torch_cache import Cache
from tests.helpers import cache_rows as rows

CAPACITIES, BATCH = (20, 33, 9), 3
DTYPES = ("fp16", "int8", "fp8")
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def tensor(array: np.ndarray) -> torch.Tensor:
    eight_bit = array.dtype == ml_dtypes.float8_e4m3fn
    return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn) if eight_bit else torch.from_numpy(array)


def there(layers: Sequence[rows.Layer]) -> tuple[list[Cache], list[torch.Tensor]]:
    """The layers as caches of torch's, in memory of their own."""
    names = ("key", "latent", "key_scale", "latent_scale")
    caches = [Cache.of(tuple(tensor(x.arrays[n].copy()) for n in names if n in x.arrays)) for x in layers]
    return caches, [torch.from_numpy(layer.arrays["received"].copy()) for layer in layers]


def held(cache: Cache) -> dict[str, np.ndarray]:
    """What keys and latents of a cache are, float64."""
    scales = [scale.double().numpy()[..., None] for scale in cache.scales] or [1.0, 1.0]
    found = [part.double().numpy() for part in (cache.key, cache.latent)]
    return {name: x * scale for name, x, scale in zip(("key", "latent"), found, scales, strict=True)}


@every_dtype
@pytest.mark.parametrize("observed", [True, False])
def test_rows_are_folded_and_then_moved(dtype: str, observed: bool) -> None:
    layers = rows.layers("gqa", "fp16", dtype, CAPACITIES, BATCH, True, DTYPES.index(dtype))
    moves, folds, weights = rows.lines(np.random.default_rng(0), CAPACITIES, BATCH)
    caches, received = there(layers)
    move_rows(caches, received if observed else (), moves, folds, weights)
    for i, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
        sums = rows.folded(layer, i, folds, weights)
        after = {name: np.where(np.isnan(values), layer.value(name), values) for name, values in sums.items()}
        changed = {name: np.where(np.isnan(values), 0.0, 1.0) for name, values in sums.items()}
        arrays = after | {"received": layer.arrays["received"].copy()}
        copied, changed = (rows.moved(rows.Layer(each), i, moves) for each in (arrays, changed))
        for name, found in held(cache).items():
            bound = rows.allowed(copied[name], "fp16", dtype) * changed[name]  # what is only copied keeps every bit
            assert (np.abs(found - copied[name]) <= bound + 1e-12).all()
        if observed:
            assert np.array_equal(received[i].numpy(), copied["received"])


@every_dtype
def test_keys_turn_as_if_they_stood_elsewhere(dtype: str) -> None:
    layers = rows.layers("gqa", "fp16", dtype, CAPACITIES, BATCH, True)
    shifts = [np.random.default_rng(0).integers(-3, 4, (BATCH, n)) for n in CAPACITIES]
    lines, distinct = turned_rows(shifts)
    frequency = 100.0 ** -(np.arange(32) / 32)
    angles = (distinct[:, None] * frequency).astype(np.float32)
    caches, _ = there(layers)
    rotate_keys(caches, lines, np.cos(angles), np.sin(angles))
    for layer, cache, shift in zip(layers, caches, shifts, strict=True):
        a, b = np.split(layer.value("key"), 2, axis=-1)
        turn = shift[:, None, :, None] * frequency
        exact = np.concatenate([a * np.cos(turn) - b * np.sin(turn), b * np.cos(turn) + a * np.sin(turn)], -1)
        found = held(cache)
        moved = np.broadcast_to((shift != 0)[:, None, :, None], exact.shape)
        assert (np.abs(found["key"] - exact) <= rows.allowed(exact, "fp16", dtype) * 1.001)[moved].all()
        assert np.array_equal(found["key"][~moved], layer.value("key")[~moved])
        assert np.array_equal(found["latent"], layer.value("latent"))


def test_nothing_to_do() -> None:
    layers = rows.layers("gta", "fp16", "fp16", CAPACITIES, BATCH, True)
    caches, received = there(layers)
    none = np.zeros((0, 4), np.int32)
    move_rows(caches, received, none, none, np.zeros(0, np.float32))
    rotate_keys(caches, none, np.zeros((0, 32), np.float32), np.zeros((0, 32), np.float32))
    assert all(np.array_equal(held(c)["key"], layer.value("key")) for layer, c in zip(layers, caches, strict=True))


def test_a_row_that_there_is_not() -> None:
    caches, received = there(rows.layers("gta", "fp16", "fp16", CAPACITIES, BATCH, True))
    line, none = np.array([[2, 0, 9, 1]], np.int32), np.zeros((0, 4), np.int32)
    with pytest.raises(BackendError, match=r"moves have a line \[2, 0, 9, 1\]"):
        move_rows(caches, received, line, none, np.zeros(0, np.float32))
