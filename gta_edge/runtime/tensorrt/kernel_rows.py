"""Rows of an engine's cache moved, folded and rotated by this package's kernels: one launch for all layers.

Does what ``CudaCache`` does, for engines that have the package's plugins, and so a compiler and caches of 16 or 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.cuda.gpu import Gpu
from gta_edge.cuda.session import Cuda
from gta_edge.model.config import ModelConfig
from gta_edge.model.kv_cache import is_scale
from gta_edge.model.tables import rotations
from gta_edge.plugins.attention.definition import MAX_BIAS_ROWS
from gta_edge.plugins.cache.kernels import cache_kernels
from gta_edge.plugins.cache.launches import LayerRows, Part, Program, address_table, fold_starts, turned_rows
from gta_edge.runtime.cache_moves import Moves
from gta_edge.runtime.cuda_cache import DeviceTensor

__all__ = ["MAX_LINES", "KernelRows"]

MAX_LINES = 4096
"""Rows of one launch, or those that a layer has, if they are more."""

Array = npt.NDArray[Any]


class KernelRows:
    """The tensors of a cache, whose addresses stay.

    Args:
        cuda: where they are, and the stream on which they are used.
        gpu: the same GPU, to compile for.
        config: the model's sizes.
        compute: type of activations, ``fp16`` or ``bf16``.
        batch: most rows of a batch.
        tensors: of all layers.

    Raises:
        BackendError: the kernels cannot be compiled or loaded.
        CapacityError: the GPU has no room for a few megabytes.
    """

    def __init__(
        self, cuda: Cuda, gpu: Gpu, config: ModelConfig, compute: str, batch: int, tensors: Sequence[DeviceTensor]
    ) -> None:
        self._cuda, self._config = cuda, config
        layers = [_layer(tensors, layer) for layer in range(config.num_hidden_layers)]
        values = next(each.tensor.dtype for each in tensors if each.tensor.width is not None)
        self._kernels = cache_kernels(Program(compute, values), gpu)
        self._sizes = {"layers": len(layers), "batch": batch}
        self._most = most = max(MAX_LINES, *(each.capacity + MAX_BIAS_ROWS for each in tensors))
        self._buffers: dict[str, tuple[int, Array]] = {}
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "table": ((len(layers), 3, 5), np.int64),
            "lines": ((most, 4), np.int32),
            "weights": ((most,), np.float32),
            "starts": ((most + 1,), np.int32),
            "cos": ((most, config.key_width // 2), np.float32),
            "sin": ((most, config.key_width // 2), np.float32),
        }
        for name, (shape, dtype) in shapes.items():
            host = cuda.host_array(shape, dtype, "a buffer for rows that move")
            self._buffers[name] = cuda.allocate(host.nbytes, "a buffer for rows that move"), host
        self._table = self._there("table", address_table(layers))
        cuda.synchronize()

    def move(self, moves: Moves) -> None:
        """Fold rows, then copy rows; see ``Moves``."""
        stream, table = self._cuda.stream, self._table
        for part in _groups(moves.folds, self._most):
            folds, starts = moves.folds[part], fold_starts(moves.folds[part])
            addresses = {"folds": self._there("lines", folds), "starts": self._there("starts", starts)}
            addresses["weights"] = self._there("weights", moves.fold_weights[part])
            self._kernels.fold(stream, table=table, **addresses, count=len(starts) - 1, **self._sizes)
            self._cuda.synchronize()  # before the buffers are filled again
        for start in range(0, len(moves.moves), self._most):
            lines = moves.moves[start : start + self._most]
            address = self._there("lines", lines)
            self._kernels.move(stream, table=table, moves=address, count=len(lines), **self._sizes)
            self._cuda.synchronize()

    def rotate(self, shifts: Sequence[npt.NDArray[np.int64]]) -> None:
        """Rotate keys as if positions were larger by ``shifts``, int64 [B, S] of each layer; S may be smaller here."""
        unrotated = self._config.unrotated_layers
        shifts = [np.zeros_like(shift) if layer in unrotated else shift for layer, shift in enumerate(shifts)]
        turned, distinct = turned_rows(shifts)
        for start in range(0, len(turned), self._most):
            lines = turned[start : start + self._most].copy()
            used, lines[:, 3] = np.unique(lines[:, 3], return_inverse=True)
            cos, sin = rotations(self._config, distinct[used])
            addresses = {"rows": self._there("lines", lines), "cos": self._there("cos", cos)}
            addresses["sin"] = self._there("sin", sin)
            counts = {"count": len(lines), "angles": len(used)}
            self._kernels.rotate(self._cuda.stream, table=self._table, **addresses, **counts, **self._sizes)
            self._cuda.synchronize()

    def _there(self, name: str, values: Array) -> int:
        """Start the copy of values to the GPU; return their address."""
        address, host = self._buffers[name]
        host[: len(values)] = values
        self._cuda.copy_in(address, host[: len(values)])
        return address


def _layer(tensors: Sequence[DeviceTensor], layer: int) -> LayerRows:
    """Return the parts of a layer: the first with a width is the key, the other the latent or value."""
    mine = [each for each in tensors if each.tensor.layer == layer]
    values = [each for each in mine if each.tensor.width is not None]
    scales = [each.address for each in mine if is_scale(each.tensor.name)] or [0, 0]
    received = [each for each in mine if each.tensor.width is None and not is_scale(each.tensor.name)]
    key, latent = (
        Part(each.address, each.tensor.heads, each.row_bytes, each.capacity, scale)
        for each, scale in zip(values, scales, strict=True)
    )
    parts = [Part(each.address, 1, each.row_bytes, each.capacity) for each in received]
    return LayerRows(key, latent, *parts)


def _groups(folds: npt.NDArray[np.int32], most: int) -> Iterator[slice]:
    """Yield slices of at most so many folds, those of one target together: they are neighbours, and no more."""
    start = 0
    while start < len(folds):
        stop = min(start + most, len(folds))
        if stop < len(folds):
            here, behind = folds[start:stop, [0, 1, 3]], folds[stop, [0, 1, 3]]
            stop -= int((here == behind).all(axis=1).sum())
        yield slice(start, stop)
        start = stop
