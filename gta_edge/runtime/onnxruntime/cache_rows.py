"""Rows of caches in numpy: moved, folded, and keys rotated, in whatever type and order of axes they lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.model.config import ModelConfig
from gta_edge.model.kv_cache import CacheTensor, scale_name
from gta_edge.model.tables import rotations
from gta_edge.numerics.dtypes import LARGEST_CODES
from gta_edge.runtime.cache_moves import Moves, by_layer

__all__ = ["CacheRows"]

_LARGEST_CODE = LARGEST_CODES["int8"]

Array = npt.NDArray[Any]


class CacheRows:
    """The rows of all tensors of a cache.

    Args:
        config: the model's sizes.
        tensors: of the cache, and of what its rows received.
        arrays: their memory by name, as ``CacheTensor.shape`` has it.
    """

    def __init__(self, config: ModelConfig, tensors: Sequence[CacheTensor], arrays: Mapping[str, Array]) -> None:
        self._config = config
        # rows behind the batch: [B, S, heads] or [B, S, heads, width]
        self._rows = {each.name: np.moveaxis(arrays[each.name], each.capacity_axis, 1) for each in tensors}
        self._layers: dict[int, list[CacheTensor]] = {}
        for tensor in tensors:
            self._layers.setdefault(tensor.layer, []).append(tensor)

    def move(self, moves: Moves) -> None:
        """Fold rows, and copy rows."""
        for layer, part in by_layer(moves.folds):
            for tensor in self._values(layer):
                self._fold(tensor, moves.folds[part, 1:], moves.fold_weights[part])
        for layer, part in by_layer(moves.moves):
            b, sources, targets = moves.moves[part, 1:].T
            for tensor in self._layers[layer]:
                rows = self._rows[tensor.name]
                rows[b, targets] = rows[b, sources]

    def rotate(self, shifts: Sequence[npt.NDArray[np.int64]]) -> None:
        """Rotate keys as if their positions were larger by ``shifts``, [B, S] of each layer."""
        for layer, shift in enumerate(shifts):
            b, rows = np.nonzero(shift)
            if layer in self._config.unrotated_layers or not len(b):
                continue
            cos, sin = (table[:, None] for table in rotations(self._config, shift[b, rows]))  # [N, 1, d_k/2]
            key = self._values(layer)[0]
            first, second = np.split(self._read(key, b, rows), 2, -1)  # [N, n_k, d_k/2]
            turned = np.concatenate((first * cos - second * sin, second * cos + first * sin), -1)
            self._write(key, b, rows, turned)

    def _values(self, layer: int) -> list[CacheTensor]:
        """Return the layer's key and its latent or value."""
        return [tensor for tensor in self._layers[layer] if tensor.width is not None]

    def _fold(self, tensor: CacheTensor, rows: npt.NDArray[np.int32], weights: npt.NDArray[np.float32]) -> None:
        b, sources, targets = rows.T
        first = np.flatnonzero(np.append(True, (b[1:] != b[:-1]) | (targets[1:] != targets[:-1])))
        weighted = weights[:, None, None] * self._read(tensor, b, sources)
        self._write(tensor, b[first], targets[first], np.add.reduceat(weighted, first, 0))

    def _read(self, tensor: CacheTensor, b: Array, rows: Array) -> npt.NDArray[np.float32]:
        """Return rows, dequantised: float32 [N, heads, width]."""
        values = self._rows[tensor.name][b, rows].astype(np.float32)
        scales = self._rows.get(scale_name(tensor.name))
        return values if scales is None else values * scales[b, rows].reshape(*values.shape[:2], 1)

    def _write(self, tensor: CacheTensor, b: Array, rows: Array, values: npt.NDArray[np.float32]) -> None:
        scales = self._rows.get(scale_name(tensor.name))
        if scales is not None:
            scale = np.abs(values).max(-1, keepdims=True) / np.float32(_LARGEST_CODE)
            scales[b, rows] = scale.reshape(len(b), *scales.shape[2:])
            values = np.rint(np.divide(values, scale, out=np.zeros_like(values), where=scale > 0))
        self._rows[tensor.name][b, rows] = values
