"""Rows of a cache in the GPU's memory moved, folded and rotated by what every CUDA driver has.

Rows are moved by copies within the GPU's memory, one for each run of rows that move together: a few a layer of a
window, one for each of scattered rows. Folds and rotations, of which there are few, take arithmetic: the keys or
latents of one sequence come to the host, and what changed goes back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.cuda.session import Cuda
from gta_edge.model.config import ModelConfig
from gta_edge.model.kv_cache import CAPACITY_AXIS, CacheTensor, is_scale
from gta_edge.model.tables import rotations
from gta_edge.numerics.dtypes import DTYPES, LARGEST_CODES
from gta_edge.runtime.cache_moves import Moves

__all__ = ["CudaCache", "DeviceTensor"]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class DeviceTensor:
    """One tensor of a layer's cache in the GPU's memory, [B, heads, rows, …]: a row of each token, or of each block.

    Attributes:
        tensor: its name, heads, rows and type.
        address: of its first value.
        capacity: S.
    """

    tensor: CacheTensor
    address: int
    capacity: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of one head."""
        return DTYPES[self.tensor.dtype].bytes * prod(self.tensor.row)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sequence."""
        return tuple(int(size) for size in self.tensor.shape(1, self.capacity)[1:])

    def row(self, sequence: int, head: int, row: int) -> int:
        """Return the address of a row."""
        rows = self.shape[CAPACITY_AXIS - 1]
        return self.address + ((sequence * self.tensor.heads + head) * rows + row) * self.row_bytes


class CudaCache:
    """The tensors of a cache, whose addresses stay.

    Args:
        cuda: where they are, and the stream on which they are used.
        config: the model's sizes.
        tensors: of all layers: keys, latents or values, their scales, and what rows received, [B, S] as one head.
    """

    def __init__(self, cuda: Cuda, config: ModelConfig, tensors: Sequence[DeviceTensor]) -> None:
        self._cuda, self._config = cuda, config
        self._layers: dict[int, list[DeviceTensor]] = {}
        for tensor in tensors:
            self._layers.setdefault(tensor.tensor.layer, []).append(tensor)
        self._staging: dict[str, Array] = {}

    # --- moves -----------------------------------------------------------------------------------------------------

    def move(self, moves: Moves) -> None:
        """Fold rows, then copy rows; see ``Moves``. All of it is queued, or done, when this returns."""
        for layer, sequence, which in _groups(moves.folds):
            self._fold(layer, sequence, moves.folds[which, 2:], moves.fold_weights[which])
        for layer, sequence, which in _groups(moves.moves):
            for source, target, count in _runs(moves.moves[which, 2:]):
                for tensor in self._layers[layer]:
                    for head in range(tensor.tensor.heads):
                        places = tensor.row(sequence, head, target), tensor.row(sequence, head, source)
                        self._cuda.copy_within(*places, count * tensor.row_bytes)

    def _fold(self, layer: int, sequence: int, pairs: npt.NDArray[np.int32], weights: Floats) -> None:
        sources, (targets, group) = pairs[:, 0], np.unique(pairs[:, 1], return_inverse=True)
        for tensor, scale in self._values(layer):
            values = self._read(tensor, scale, sequence)  # [n, S, d]
            shares = np.zeros((len(targets), len(sources)), np.float32)
            shares[group.reshape(-1), np.arange(len(sources))] = weights
            values[:, targets] = shares @ values[:, sources]
            self._write(tensor, scale, sequence, values, targets)

    # --- rotations -------------------------------------------------------------------------------------------------

    def rotate(self, shifts: Sequence[npt.NDArray[np.int64]]) -> None:
        """Rotate keys as if positions were larger by ``shifts``, int64 [B, S] of each layer; S may be smaller here."""
        for layer, shift in enumerate(shifts):
            if layer in self._config.unrotated_layers:
                continue
            tensor, scale = next(self._values(layer))
            for sequence, row_shifts in enumerate(shift):
                rows = np.flatnonzero(row_shifts)
                if not len(rows):
                    continue
                cos, sin = rotations(self._config, row_shifts[rows])
                values = self._read(tensor, scale, sequence)
                first, second = np.split(values[:, rows], 2, axis=-1)
                values[:, rows] = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
                self._write(tensor, scale, sequence, values, rows)

    # --- values ----------------------------------------------------------------------------------------------------

    def _values(self, layer: int) -> Iterator[tuple[DeviceTensor, DeviceTensor | None]]:
        """Yield the key and the latent or value of a layer, each with its scales if it has them."""
        names = {each.tensor.name: each for each in self._layers[layer]}
        for each in self._layers[layer]:
            if each.tensor.width is not None:
                scales = [other for name, other in names.items() if is_scale(name)]
                kind = each.tensor.name.partition(".")[0]
                yield each, next((other for other in scales if other.tensor.name.startswith(f"{kind}_")), None)

    def _read(self, tensor: DeviceTensor, scale: DeviceTensor | None, sequence: int) -> Floats:
        """Return the values of a sequence, float32 [n, S, d]."""
        codes = self._fetched(tensor, sequence).astype(np.float32)
        return codes if scale is None else codes * self._fetched(scale, sequence)[..., None]

    def _fetched(self, tensor: DeviceTensor, sequence: int) -> Array:
        host = self._host(tensor)
        self._cuda.copy_out(host, tensor.row(sequence, 0, 0))
        self._cuda.synchronize()
        return host

    def _write(
        self, tensor: DeviceTensor, scale: DeviceTensor | None, sequence: int, values: Floats, rows: Array
    ) -> None:
        """Put rows of ``values`` [n, S, d] back, rounded to the tensor's type."""
        parts: list[tuple[DeviceTensor, Array]] = [(tensor, values[:, rows])]
        if scale is not None:
            dtype = tensor.tensor.dtype
            scales = np.abs(values[:, rows]).max(-1) / np.float32(LARGEST_CODES[dtype])  # [n, rows]
            codes = values[:, rows] / np.where(scales == 0, 1, scales)[..., None]
            parts = [(tensor, np.rint(codes) if dtype == "int8" else codes), (scale, scales)]
        for place, content in parts:
            host = self._host(place)  # as it was read
            host[:, rows] = content.astype(host.dtype)
            for head in range(place.tensor.heads):
                for start, count in _consecutive(rows):
                    self._cuda.copy_in(place.row(sequence, head, start), host[head, start : start + count])
        self._cuda.synchronize()

    def _host(self, tensor: DeviceTensor) -> Array:
        """Return an array in pinned memory for one sequence of a tensor, which those of one kind share."""
        kind = tensor.tensor.name.partition(".")[0]
        size = prod(tensor.shape)
        if kind not in self._staging:
            most = max(
                prod(each.shape)
                for layer in self._layers.values()
                for each in layer
                if each.tensor.name.partition(".")[0] == kind
            )
            dtype = DTYPES[tensor.tensor.dtype].numpy
            self._staging[kind] = self._cuda.host_array((most,), dtype, "a buffer for rows that are merged")
        return self._staging[kind][:size].reshape(tensor.shape)


def _groups(rows: npt.NDArray[np.int32]) -> Iterator[tuple[int, int, Array]]:
    """Yield layer, sequence and places of the rows of each."""
    if len(rows):
        keys, group = np.unique(rows[:, :2], axis=0, return_inverse=True)
        for i, (layer, sequence) in enumerate(keys.tolist()):
            yield layer, sequence, np.flatnonzero(group.reshape(-1) == i)


def _runs(pairs: npt.NDArray[np.int32]) -> Iterator[tuple[int, int, int]]:
    """Yield source, target and length of runs of rows that lie side by side at both."""
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 1] - pairs[:, 0]))]
    breaks = np.flatnonzero((np.diff(pairs, axis=0) != 1).any(axis=1)) + 1
    for part in np.split(pairs, breaks):
        yield int(part[0, 0]), int(part[0, 1]), len(part)


def _consecutive(rows: Array) -> Iterator[tuple[int, int]]:
    """Yield first and number of rows, which ascend, in runs."""
    for part in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
        yield int(part[0]), len(part)
