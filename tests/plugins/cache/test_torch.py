"""Rows of torch's caches moved, folded and rotated on the CPU, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gta_edge.errors import BackendError
from gta_edge.plugins.cache.launches import turned_rows
from gta_edge.plugins.cache.torch import move_rows, rotate_keys
from tests.helpers import cache_rows as rows

CAPACITIES, BATCH = (20, 33, 9), 3


def there(layers: list[rows.Layer], dtype: torch.dtype) -> tuple[list[tuple[torch.Tensor, ...]], list[torch.Tensor]]:
    caches = [tuple(torch.from_numpy(layer.value(name)).to(dtype) for name in ("key", "latent")) for layer in layers]
    return caches, [torch.from_numpy(layer.arrays["received"]) for layer in layers]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("observed", [True, False])
def test_rows_are_folded_and_then_moved(seed: int, observed: bool) -> None:
    layers = rows.layers("gqa", "fp16", "fp16", CAPACITIES, BATCH, True, seed)
    moves, folds, weights = rows.lines(np.random.default_rng(seed), CAPACITIES, BATCH)
    caches, received = there(layers, torch.float64)
    move_rows(caches, received if observed else (), moves, folds, weights)
    for i, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
        sums = rows.folded(layer, i, folds, weights)
        after = {name: np.where(np.isnan(values), layer.value(name), values) for name, values in sums.items()}
        copied = rows.moved(rows.Layer(after | {"received": layer.arrays["received"].copy()}), i, moves)
        for name, found in zip(("key", "latent"), cache, strict=True):
            np.testing.assert_allclose(found.numpy(), copied[name], rtol=1e-5, atol=1e-6)
        if observed:
            assert np.array_equal(received[i].numpy(), copied["received"])


def test_keys_turn_as_if_they_stood_elsewhere() -> None:
    layers = rows.layers("gqa", "fp16", "fp16", CAPACITIES, BATCH, True)
    shifts = [np.random.default_rng(0).integers(-3, 4, (BATCH, n)) for n in CAPACITIES]
    lines, distinct = turned_rows(shifts)
    frequency = 100.0 ** -(np.arange(32) / 32)
    angles = (distinct[:, None] * frequency).astype(np.float32)
    caches, _ = there(layers, torch.float32)
    rotate_keys(caches, lines, np.cos(angles), np.sin(angles))
    for layer, (key, latent), shift in zip(layers, caches, shifts, strict=True):
        a, b = np.split(layer.value("key"), 2, axis=-1)
        turn = shift[:, None, :, None] * frequency
        exact = np.concatenate([a * np.cos(turn) - b * np.sin(turn), b * np.cos(turn) + a * np.sin(turn)], -1)
        np.testing.assert_allclose(key.numpy(), exact, atol=1e-5)
        assert np.array_equal(latent.numpy(), layer.value("latent"))


def test_nothing_to_do() -> None:
    layers = rows.layers("gta", "fp16", "fp16", CAPACITIES, BATCH, True)
    caches, received = there(layers, torch.float32)
    none = np.zeros((0, 4), np.int32)
    move_rows(caches, received, none, none, np.zeros(0, np.float32))
    rotate_keys(caches, none, np.zeros((0, 32), np.float32), np.zeros((0, 32), np.float32))
    assert all(np.array_equal(key.numpy(), layer.value("key")) for layer, (key, _) in zip(layers, caches, strict=True))


def test_a_row_that_there_is_not() -> None:
    caches, received = there(rows.layers("gta", "fp16", "fp16", CAPACITIES, BATCH, True), torch.float32)
    line, none = np.array([[2, 0, 9, 1]], np.int32), np.zeros((0, 4), np.int32)
    with pytest.raises(BackendError, match=r"moves have a line \[2, 0, 9, 1\]"):
        move_rows(caches, received, line, none, np.zeros(0, np.float32))
