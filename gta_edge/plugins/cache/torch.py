"""Rows of torch's caches copied, folded into others, and their keys rotated.

On CUDA tensors of fp16 or bf16 by the kernels, in one launch for all layers; elsewhere in torch's own operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from gta_edge.cuda.gpu import OLDEST, current_gpu
from gta_edge.libraries.optional import optional
from gta_edge.numerics.dtypes import COMPUTE_TYPES, DTYPES
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
from gta_edge.plugins.torch_registry import ALIGNMENT_BYTES

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = optional("torch", "export")

__all__ = ["move_rows", "rotate_keys"]

Cache: TypeAlias = "tuple[Tensor, Tensor]"
"""Key and latent (or value) of a layer, [B, n, S, d] each."""


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
    batch, capacities = caches[0][0].shape[0], [key.shape[2] for key, _ in caches]
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
    batch = caches[0][0].shape[0]
    check_lines("rotated rows", rows, [key.shape[2] for key, _ in caches], batch, targets=False)
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


def _fold(caches: Sequence[Cache], folds: Lines, fold_weights: npt.NDArray[np.float32]) -> None:
    device = caches[0][0].device
    for layer, places, (b, sources, targets) in _by_layer(folds, device):
        weights = torch.tensor(fold_weights[places], device=device)[:, None, None]
        first = torch.ones_like(b, dtype=torch.bool)
        first[1:] = (b[1:] != b[:-1]) | (targets[1:] != targets[:-1])  # those of one target are neighbours
        group = first.cumsum(0) - 1
        for cache in caches[layer]:
            weighted = (weights * cache[b, :, sources].float()).masked_fill(weights == 0, 0)  # [F, n, d]
            sums = weighted.new_zeros(int(group[-1]) + 1, *weighted.shape[1:]).index_add_(0, group, weighted)
            cache[b[first], :, targets[first]] = sums.to(cache.dtype)


def _move(caches: Sequence[Cache], received: Sequence[Tensor], moves: Lines) -> None:
    for layer, _, (b, sources, targets) in _by_layer(moves, caches[0][0].device):
        for cache in caches[layer]:
            cache[b, :, targets] = cache[b, :, sources]
        if received:
            received[layer][b, targets] = received[layer][b, sources]


def _rotate(caches: Sequence[Cache], rows: Lines, cos: npt.NDArray[np.float32], sin: npt.NDArray[np.float32]) -> None:
    device = caches[0][0].device
    tables = [torch.from_numpy(table).to(device) for table in (cos, sin)]
    for layer, _, (b, sources, angles) in _by_layer(rows, device):
        key = caches[layer][0]
        c, s = (table[angles][:, None] for table in tables)  # [N, 1, d_k/2]
        first, second = key[b, :, sources].float().chunk(2, -1)  # [N, n_k, d_k/2]
        key[b, :, sources] = torch.cat((first * c - second * s, second * c + first * s), -1).to(key.dtype)


# --- on the kernels --------------------------------------------------------------------------------------------------


def _kernels(caches: Sequence[Cache], received: Sequence[Tensor]) -> CacheKernels | None:
    """Return the kernels that take these caches, or None."""
    tensors = [tensor for cache in caches for tensor in cache]
    device, dtype = tensors[0].device, tensors[0].dtype
    types = {getattr(torch, DTYPES[name].array): name for name in COMPUTE_TYPES}
    if device.type != "cuda" or dtype not in types or torch.cuda.get_device_capability(device) < OLDEST:
        return None
    if any(tensor.dtype != torch.float32 or not tensor.is_contiguous() for tensor in received):
        return None
    for tensor in tensors:
        if tensor.dtype != dtype or not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT_BYTES:
            return None
        if tensor.shape[3] > MAX_WIDTH or tensor.shape[3] * tensor.element_size() % 4:
            return None
    index = torch.cuda.current_device() if device.index is None else device.index
    return cache_kernels(Program(types[dtype], types[dtype]), current_gpu(index))


def _there(caches: Sequence[Cache], received: Sequence[Tensor], *arrays: npt.NDArray[Any]) -> tuple[Tensor, list[int]]:
    """Copy the table and arrays of 4-byte numbers to the device at once; return the memory, and their addresses."""
    whole = [
        address_table([_rows(*cache, *received[i : i + 1]) for i, cache in enumerate(caches)]).reshape(-1),
        *arrays,
    ]
    parts = [np.ascontiguousarray(array).reshape(-1).view(np.int32) for array in whole]
    there = torch.from_numpy(np.concatenate(parts)).to(caches[0][0].device)
    places = np.cumsum([0, *(len(part) for part in parts[:-1])])
    return there, [there.data_ptr() + 4 * int(place) for place in places]


def _rows(key: Tensor, latent: Tensor, received: Tensor | None = None) -> LayerRows:
    of_received = None if received is None else Part(received.data_ptr(), 1, 4, received.shape[1])
    return LayerRows(_part(key), _part(latent), of_received)


def _part(cache: Tensor) -> Part:
    return Part(cache.data_ptr(), cache.shape[1], cache.shape[3] * cache.element_size(), cache.shape[2])
