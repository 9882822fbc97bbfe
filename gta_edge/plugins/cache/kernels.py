"""The kernels that move, fold and rotate rows of caches on a GPU: loaded once, then launched on device addresses.

Knows of no framework. A launch allocates nothing and waits for nothing.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from gta_edge.cuda.gpu import Gpu, Launcher, check_addresses
from gta_edge.plugins.cache.launches import FOLD, MOVE, ROTATE, SIGNATURES, Program, row_launch
from gta_edge.plugins.domain import KERNELS

__all__ = ["CacheKernels", "cache_kernels"]

_ALIGNMENTS = {"table": 8} | dict.fromkeys(("moves", "folds", "weights", "starts", "rows", "cos", "sin"), 4)


@cache
def cache_kernels(program: Program, gpu: Gpu) -> CacheKernels:
    """Return the kernels of a type of cache on a GPU, compiled and loaded at the first call.

    Raises:
        BackendError: as for ``CacheKernels``.
    """
    return CacheKernels(program, gpu)


class CacheKernels:
    """The kernels of one type of cache, loaded on one GPU.

    All take ``table``, the address of what ``address_table`` returns, int64 [L, 3, 5], and the numbers L and B.

    Args:
        program: types of the model and its caches.
        gpu: where they run.

    Raises:
        BackendError: the kernels cannot be compiled or not be loaded.
    """

    def __init__(self, program: Program, gpu: Gpu) -> None:
        self._launcher = Launcher(gpu, "cache", KERNELS)
        loaded = self._launcher.load({program: dict.fromkeys(program.kernels, 0)})
        self._kernels = {name: loaded[program, name] for name in program.kernels}

    def move(self, stream: Any, *, table: int, moves: int, count: int, layers: int, batch: int) -> None:
        """Launch the copy of rows in every tensor of their layers. No row is a source and a target.

        Args:
            stream: as ``Launcher.launch`` takes it.
            table: [L, 3, 5].
            moves: int32 [N, 4].
            count: N.
            layers: L.
            batch: B.

        Raises:
            BackendError: a size or an address that the kernel cannot take, or the launch failed.
        """
        self._launch(MOVE, stream, (table, moves), count, layers, batch)

    def fold(
        self, stream: Any, *, table: int, folds: int, weights: int, starts: int, count: int, layers: int, batch: int
    ) -> None:
        """Launch the sums of weight times source, in keys and latents. No target is another's source.

        Args:
            stream: as ``Launcher.launch`` takes it.
            table: [L, 3, 5].
            folds: int32 [F, 4], those of one target one after another.
            weights: float32 [F].
            starts: of ``fold_starts``, int32 [N + 1].
            count: N, targets.
            layers: L.
            batch: B.

        Raises:
            BackendError: a size or an address that the kernel cannot take, or the launch failed.
        """
        self._launch(FOLD, stream, (table, folds, weights, starts), count, layers, batch)

    def rotate(
        self,
        stream: Any,
        *,
        table: int,
        rows: int,
        cos: int,
        sin: int,
        count: int,
        angles: int,
        layers: int,
        batch: int,
    ) -> None:
        """Launch the rotation of keys.

        Args:
            stream: as ``Launcher.launch`` takes it.
            table: [L, 3, 5].
            rows: of ``turned_rows``, int32 [N, 4].
            cos: float32 [A, d_k/2].
            sin: float32 [A, d_k/2].
            count: N.
            angles: A.
            layers: L.
            batch: B.

        Raises:
            BackendError: a size or an address that the kernel cannot take, or the launch failed.
        """
        self._launch(ROTATE, stream, (table, rows, cos, sin), count, angles, layers, batch)

    def _launch(self, kernel: str, stream: Any, addresses: tuple[int, ...], count: int, *numbers: int) -> None:
        check_addresses(zip(SIGNATURES[kernel].addresses, addresses, strict=True), _ALIGNMENTS, ())
        launch = row_launch(kernel, count)
        # An int of Python would be passed as 8 bytes.
        arguments = (*addresses, *map(np.int32, (count, *numbers)))
        self._launcher.launch(stream, [(self._launcher.config(launch), self._kernels[kernel], *arguments)])
