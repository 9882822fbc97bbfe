"""The kernels that move, fold and rotate rows of caches on a GPU, and the functions of torch that use them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gta_edge.cuda.gpu import current_gpu
from gta_edge.plugins.cache.kernels import CacheKernels, cache_kernels
from gta_edge.plugins.cache.launches import LayerRows, Part, Program, address_table, fold_starts, turned_rows
from gta_edge.plugins.cache.torch import move_rows, rotate_keys
from tests.helpers import cache_rows as rows
from tests.helpers.gpu_calls import TYPES, Memory, on_gpu, synchronize

KINDS = [("bf16", "bf16"), ("fp16", "int8"), ("bf16", "fp8")]
CAPACITIES, BATCH = (300, 517, 64), 3


class OnGpu:
    """Layers' arrays in the GPU's memory, between guards, and the kernels that take them."""

    def __init__(self, layers: list[rows.Layer], types: tuple[str, str]) -> None:
        self.layers, self.memory = layers, Memory()
        for i, layer in enumerate(layers):
            for name, array in layer.arrays.items():
                self.memory.add(f"{i}.{name}", bytes_of(array))
        table = address_table([self._rows(i) for i in range(len(layers))])
        self.memory.add("table", torch.from_numpy(table))
        self.kernels: CacheKernels = cache_kernels(Program(*types), current_gpu())
        self.common = {"table": self.address("table"), "layers": len(layers), "batch": BATCH}

    def address(self, name: str) -> int:
        return self.memory.tensors[name].data_ptr()

    def add(self, **arrays: Any) -> dict[str, int]:
        for name, array in arrays.items():
            self.memory.add(name, torch.from_numpy(np.ascontiguousarray(array)))
        return {name: self.address(name) for name in arrays}

    def _rows(self, i: int) -> LayerRows:
        parts = {}
        for name in ("key", "latent", "received"):
            array = self.layers[i].arrays[name]
            heads, width = (1, 1) if name == "received" else (array.shape[1], array.shape[3])
            scales = self.address(f"{i}.{name}_scale") if f"{name}_scale" in self.layers[i].arrays else 0
            parts[name] = Part(
                self.address(f"{i}.{name}"),
                heads,
                width * array.itemsize,
                array.shape[-1 if name == "received" else 2],
                scales,
            )
        return LayerRows(**parts)

    def fetch(self) -> None:
        """Wait, and take what is in the GPU's memory as the layers' arrays."""
        synchronize()
        self.memory.check_guards()
        for i, layer in enumerate(self.layers):
            for name, array in layer.arrays.items():
                found = self.memory.tensors[f"{i}.{name}"].cpu().numpy()
                layer.arrays[name] = found.view(array.dtype).reshape(array.shape)


def bytes_of(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def make(types: tuple[str, str], dims: str) -> tuple[list[rows.Layer], np.ndarray, np.ndarray, np.ndarray]:
    layers = rows.layers(dims, *types, CAPACITIES, BATCH, received=True)
    return layers, *rows.lines(np.random.default_rng(1), CAPACITIES, BATCH)


every_kind = pytest.mark.parametrize("types", KINDS, ids=lambda types: types[1])
every_size = pytest.mark.parametrize("dims", rows.DIMS)


@on_gpu
@every_kind
@every_size
def test_moves_copy_every_bit_of_a_row(types: tuple[str, str], dims: str) -> None:
    layers, moves, _, _ = make(types, dims)
    expected = [rows.moved(layer, i, moves) for i, layer in enumerate(layers)]
    there = OnGpu(layers, types)
    there.kernels.move(0, **there.add(moves=moves), count=len(moves), **there.common)
    there.fetch()
    for layer, wanted in zip(layers, expected, strict=True):
        assert all(layer.arrays[name].tobytes() == array.tobytes() for name, array in wanted.items())


@on_gpu
@every_kind
@every_size
def test_folds_are_weighted_sums(types: tuple[str, str], dims: str) -> None:
    layers, _, folds, weights = make(types, dims)
    expected = [rows.folded(layer, i, folds, weights) for i, layer in enumerate(layers)]
    old = [{name: layer.value(name) for name in ("key", "latent")} for layer in layers]
    there, starts = OnGpu(layers, types), fold_starts(folds)
    addresses = there.add(folds=folds, weights=weights, starts=starts)
    there.kernels.fold(0, **addresses, count=len(starts) - 1, **there.common)
    there.fetch()
    for layer, wanted, before in zip(layers, expected, old, strict=True):
        for name, values in wanted.items():
            target = ~np.isnan(values)
            found, exact = layer.value(name), np.where(target, values, before[name])
            assert (found[~target] == exact[~target]).all(), name
            assert (np.abs(found - exact) <= rows.allowed(exact, *types))[target].all(), name


@on_gpu
@every_kind
@every_size
def test_keys_are_rotated_as_if_they_stood_elsewhere(types: tuple[str, str], dims: str) -> None:
    layers, *_ = make(types, dims)
    rng, half = np.random.default_rng(2), rows.DIMS[dims][0][1] // 2
    shifts = [rng.integers(-3, 4, (BATCH, capacity)) for capacity in CAPACITIES]
    lines, distinct = turned_rows(shifts)
    angles = distinct[:, None] / 100.0 ** (np.arange(half) / half)
    old = [layer.value("key") for layer in layers]
    there = OnGpu(layers, types)
    addresses = there.add(rows=lines, cos=np.cos(angles).astype(np.float32), sin=np.sin(angles).astype(np.float32))
    there.kernels.rotate(0, **addresses, count=len(lines), angles=len(distinct), **there.common)
    there.fetch()
    for layer, key, shift in zip(layers, old, shifts, strict=True):
        turn = shift[:, None, :, None] / 100.0 ** (np.arange(half) / half)
        a, b = np.split(key, 2, axis=-1)
        exact = np.concatenate([a * np.cos(turn) - b * np.sin(turn), b * np.cos(turn) + a * np.sin(turn)], -1)
        error = np.abs(layer.value("key") - exact)
        assert (error <= rows.allowed(exact, *types) + 1e-6 * np.abs(exact).max()).all()


def in_torch(layers: list[rows.Layer], device: str, compute: str) -> tuple[list[Any], list[torch.Tensor]]:
    def there(array: np.ndarray) -> torch.Tensor:
        return bytes_of(array).view(TYPES[compute]).view(array.shape).to(device)

    caches = [(there(layer.arrays["key"]), there(layer.arrays["latent"])) for layer in layers]
    return caches, [torch.from_numpy(layer.arrays["received"].copy()).to(device) for layer in layers]


@on_gpu
@every_size
@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_torch_does_the_same_on_a_gpu_as_on_the_cpu(dims: str, compute: str) -> None:
    """Up to rounding: sums are taken in another order."""
    layers, moves, folds, weights = make((compute, compute), dims)
    lines, distinct = turned_rows([np.random.default_rng(3).integers(-2, 3, (BATCH, n)) for n in CAPACITIES])
    half = rows.DIMS[dims][0][1] // 2
    angles = (distinct[:, None] / 10.0 ** (np.arange(half) / half)).astype(np.float32)
    results = []
    for device in ("cuda", "cpu"):
        caches, received = in_torch(layers, device, compute)
        move_rows(caches, received, moves, folds, weights)
        rotate_keys(caches, lines, np.cos(angles), np.sin(angles))
        results.append(([[x.cpu().float() for x in cache] for cache in caches], [x.cpu() for x in received]))
    (caches, received), (expected, expected_received) = results
    for one, other in zip(caches, expected, strict=True):
        for found, wanted in zip(one, other, strict=True):
            torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    for found, wanted in zip(received, expected_received, strict=True):
        assert torch.equal(found, wanted)
