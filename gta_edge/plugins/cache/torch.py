"""Rows of torch's caches copied, folded into others, and their keys rotated.

On CUDA tensors of fp16 or bf16, and of 8 bits, by the kernels, in one launch for all layers; elsewhere in torch's own
operations. A row of 8 bits that changes is dequantised, and quantised again. Caches in blocks have no rows to move.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gta_edge.cuda.gpu import OLDEST, current_gpu
from gta_edge.libraries.optional import optional
from gta_edge.numerics.dtypes import COMPUTE_TYPES, DTYPES, ROW_CACHE_TYPES
from gta_edge.plugins.cache.kernels import CacheKernels, cache_kernels
from gta_edge.plugins.cache.launches import (
    MAX_WIDTH,
    LayerRows,
    Lines,
    Part,
    Program,
    address_table,
    check_lines,
    fold_starts,
)
from gta_edge.plugins.torch_cache import Cache, dequantize_rows, quantize_rows
from gta_edge.plugins.torch_registry import ALIGNMENT_BYTES

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = optional("torch", "export")

__all__ = ["move_rows", "rotate_keys"]


def move_rows(
    caches: Sequence[Cache],
    received: Sequence[Tensor],
    moves: Lines,
    folds: Lines,
    fold_weights: npt.NDArray[np.float32],
) -> None:
    """Fold and copy rows of caches, folds first.

    Args:
        caches: of each layer.
        received: of each layer [B, S]; empty where nothing is observed. It is copied, and not folded.
        moves: int32 [N, 4], columns layer, sequence, source row, target row; no row is a source and a target.
        folds: int32 [F, 4], the same: each target becomes the sum of weight times source over its folds, which are
            neighbours; no target is another's source. A row that counts nothing may hold anything.
        fold_weights: float32 [F].

    Raises:
        BackendError: a line names a row that there is not.
    """
    batch, capacities = caches[0].key.shape[0], [cache.key.shape[2] for cache in caches]
    for name, lines in (("moves", moves), ("folds", folds)):
        check_lines(name, lines, capacities, batch)
    kernels = _kernels(caches, received)
    if kernels is None:
        _fold(caches, folds, fold_weights)
        _move(caches, received, moves)
        return
    starts = fold_starts(folds)
    memory, (table, *there) = _there(caches, received, moves, folds, fold_weights, starts)
    sizes = {"table": table, "layers": len(caches), "batch": batch}
    with torch.cuda.device(memory.device):  # whose default stream has the handle of every other GPU's
        stream = torch.cuda.current_stream(memory.device).cuda_stream
        if len(folds):
            kernels.fold(stream, folds=there[1], weights=there[2], starts=there[3], count=len(starts) - 1, **sizes)
        if len(moves):
            kernels.move(stream, moves=there[0], count=len(moves), **sizes)


def rotate_keys(
    caches: Sequence[Cache], rows: Lines, cos: npt.NDArray[np.float32], sin: npt.NDArray[np.float32]
) -> None:
    """Rotate keys: pairs (i, i + d_k/2), as RoPE does.

    Args:
        caches: of each layer.
        rows: int32 [N, 4], columns layer, sequence, row, and which angles (``turned_rows``).
        cos: float32 [A, d_k/2].
        sin: float32 [A, d_k/2].

    Raises:
        BackendError: a line names a row that there is not.
    """
    batch = caches[0].key.shape[0]
    check_lines("rotated rows", rows, [cache.key.shape[2] for cache in caches], batch, targets=False)
    if not len(rows):
        return
    kernels = _kernels(caches, ())
    if kernels is None:
        _rotate(caches, rows, cos, sin)
        return
    memory, (table, *there) = _there(caches, (), rows, cos, sin)
    sizes = {"count": len(rows), "angles": len(cos), "layers": len(caches), "batch": batch}
    with torch.cuda.device(memory.device):
        stream = torch.cuda.current_stream(memory.device).cuda_stream
        kernels.rotate(stream, table=table, rows=there[0], cos=there[1], sin=there[2], **sizes)


# --- in torch's own operations ---------------------------------------------------------------------------------------


def _by_layer(lines: Lines, device: torch.device) -> Iterator[tuple[int, npt.NDArray[np.intp], Tensor]]:
    """Yield of each layer its lines' places, and their other columns, int64 [3, N], on the device."""
    for layer in np.unique(lines[:, 0]).tolist():
        places = np.flatnonzero(lines[:, 0] == layer)
        yield layer, places, torch.tensor(lines[places, 1:].T, dtype=torch.int64, device=device)


def _parts(cache: Cache) -> list[tuple[Tensor, Tensor | None]]:
    """Return the key and the latent of a layer, each with its scales if it has any."""
    return list(zip((cache.key, cache.latent), cache.scales or (None, None), strict=True))


def _read(tensor: Tensor, scales: Tensor | None, sequences: Tensor, rows: Tensor) -> Tensor:
    """Return rows [N, n, d] in float32."""
    values = tensor[sequences, :, rows]
    return values.float() if scales is None else dequantize_rows(values, scales[sequences, :, rows])


def _write(tensor: Tensor, scales: Tensor | None, sequences: Tensor, rows: Tensor, values: Tensor) -> None:
    """Write rows [N, n, d] of float32, rounded."""
    if scales is None:
        tensor[sequences, :, rows] = values.to(tensor.dtype)
        return
    codes, scales[sequences, :, rows] = quantize_rows(values, tensor.dtype)
    _bytes(tensor)[sequences, :, rows] = _bytes(codes)


def _bytes(tensor: Tensor) -> Tensor:
    """Return what torch can assign by index: it has no such operation for 8-bit floats."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def _fold(caches: Sequence[Cache], folds: Lines, fold_weights: npt.NDArray[np.float32]) -> None:
    device = caches[0].key.device
    for layer, places, (b, sources, targets) in _by_layer(folds, device):
        weights = torch.tensor(fold_weights[places], device=device)[:, None, None]
        first = torch.ones_like(b, dtype=torch.bool)
        first[1:] = (b[1:] != b[:-1]) | (targets[1:] != targets[:-1])  # those of one target are neighbours
        group = first.cumsum(0) - 1
        for part in _parts(caches[layer]):
            weighted = (weights * _read(*part, b, sources)).masked_fill(weights == 0, 0)  # [F, n, d]
            sums = weighted.new_zeros(int(group[-1]) + 1, *weighted.shape[1:]).index_add_(0, group, weighted)
            _write(*part, b[first], targets[first], sums)


def _move(caches: Sequence[Cache], received: Sequence[Tensor], moves: Lines) -> None:
    for layer, _, (b, sources, targets) in _by_layer(moves, caches[0].key.device):
        for tensor in map(_bytes, caches[layer].tensors):
            tensor[b, :, targets] = tensor[b, :, sources]
        if received:
            received[layer][b, targets] = received[layer][b, sources]


def _rotate(caches: Sequence[Cache], rows: Lines, cos: npt.NDArray[np.float32], sin: npt.NDArray[np.float32]) -> None:
    device = caches[0].key.device
    tables = [torch.from_numpy(table).to(device) for table in (cos, sin)]
    for layer, _, (b, sources, angles) in _by_layer(rows, device):
        key = _parts(caches[layer])[0]
        c, s = (table[angles][:, None] for table in tables)  # [N, 1, d_k/2]
        first, second = _read(*key, b, sources).chunk(2, -1)  # [N, n_k, d_k/2]
        _write(*key, b, sources, torch.cat((first * c - second * s, second * c + first * s), -1))


# --- on the kernels --------------------------------------------------------------------------------------------------


def _kernels(caches: Sequence[Cache], received: Sequence[Tensor]) -> CacheKernels | None:
    """Return the kernels that take these caches, or None."""
    values = [tensor for cache in caches for tensor in (cache.key, cache.latent)]
    floats = [*(scales for cache in caches for scales in cache.scales), *received]
    device, dtype = values[0].device, values[0].dtype
    types = {getattr(torch, DTYPES[name].array): name for name in (*COMPUTE_TYPES, *ROW_CACHE_TYPES)}
    if device.type != "cuda" or dtype not in types or torch.cuda.get_device_capability(device) < OLDEST:
        return None
    if any(tensor.dtype != torch.float32 or not tensor.is_contiguous() for tensor in floats):
        return None
    for tensor in values:
        if tensor.dtype != dtype or not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT_BYTES:
            return None
        if tensor.shape[3] > MAX_WIDTH or tensor.shape[3] * tensor.element_size() % 4:
            return None
    index = torch.cuda.current_device() if device.index is None else device.index
    name = types[dtype]
    compute = name if name in COMPUTE_TYPES else COMPUTE_TYPES[0]  # rows of 8 bits are the same in all
    return cache_kernels(Program(compute, name), current_gpu(index))


def _there(caches: Sequence[Cache], received: Sequence[Tensor], *arrays: npt.NDArray[Any]) -> tuple[Tensor, list[int]]:
    """Copy the table and arrays of 4-byte numbers to the device at once; return the memory, and their addresses."""
    whole = [
        address_table([_rows(cache, *received[i : i + 1]) for i, cache in enumerate(caches)]).reshape(-1),
        *arrays,
    ]
    parts = [np.ascontiguousarray(array).reshape(-1).view(np.int32) for array in whole]
    there = torch.from_numpy(np.concatenate(parts)).to(caches[0].key.device)
    places = np.cumsum([0, *(len(part) for part in parts[:-1])])
    return there, [there.data_ptr() + 4 * int(place) for place in places]


def _rows(cache: Cache, received: Tensor | None = None) -> LayerRows:
    of_received = None if received is None else Part(received.data_ptr(), 1, 4, received.shape[1])
    key, latent = (_part(*part) for part in _parts(cache))
    return LayerRows(key, latent, of_received)


def _part(tensor: Tensor, scales: Tensor | None) -> Part:
    row_bytes = tensor.shape[3] * tensor.element_size()
    return Part(
        tensor.data_ptr(), tensor.shape[1], row_bytes, tensor.shape[2], 0 if scales is None else scales.data_ptr()
    )
