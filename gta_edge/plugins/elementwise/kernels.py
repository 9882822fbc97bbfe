"""The kernels between matmuls on a GPU: compiled and loaded once, then launched on device addresses.

Knows of no framework. A launch allocates nothing and waits for nothing, so that it can be captured in a CUDA graph.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, TypeAlias

import numpy as np

from gta_edge.cuda.gpu import Gpu, Launcher, check_addresses
from gta_edge.plugins.domain import KERNELS
from gta_edge.plugins.elementwise.launches import (
    ADD_NORM,
    MAX_WIDTH,
    SIGNATURES,
    SILU_MULTIPLY,
    VECTOR,
    Program,
    add_norm_launch,
    silu_launch,
)

__all__ = ["ElementwiseKernels", "elementwise_kernels"]

_LAUNCHES_CACHED = 256
_Prepared: TypeAlias = tuple[Any, Any, tuple[Any, ...]]
"""A launch's config, its kernel, and its numbers."""


@cache
def elementwise_kernels(compute: str, gpu: Gpu) -> ElementwiseKernels:
    """Return the kernels of a type on a GPU, compiled and loaded at the first call.

    Raises:
        BackendError: as for ``ElementwiseKernels``.
    """
    return ElementwiseKernels(compute, gpu)


class ElementwiseKernels:
    """Both kernels in one type, loaded on one GPU.

    Args:
        compute: type of everything: ``fp16`` or ``bf16``.
        gpu: where they run.

    Raises:
        BackendError: the kernels cannot be compiled or not be loaded.
    """

    def __init__(self, compute: str, gpu: Gpu) -> None:
        self.gpu = gpu
        program = Program(compute)
        self._launcher = Launcher(gpu, "elementwise", KERNELS)
        shared_bytes = {ADD_NORM: add_norm_launch(1, MAX_WIDTH).shared_bytes, SILU_MULTIPLY: 0}
        loaded = self._launcher.load({program: shared_bytes})
        self._kernels = {name: loaded[program, name] for name in program.kernels}
        self._add_norm = lru_cache(_LAUNCHES_CACHED)(self._prepare_add_norm)
        self._silu_multiply = lru_cache(_LAUNCHES_CACHED)(self._prepare_silu_multiply)

    def add_norm(
        self,
        stream: Any,
        *,
        x: int,
        addend: int = 0,
        weight: int,
        sum: int = 0,  # noqa: A002  # as in the source
        normed: int,
        rows: int,
        width: int,
        epsilon: float,
    ) -> None:
        """Launch sum = x + addend, rounded, and normed = RMSNorm(sum) · weight.

        Addresses are multiples of 16 bytes.

        Args:
            stream: as ``Launcher.launch`` takes it.
            x: [rows, width].
            addend: the same; 0 for none.
            weight: [width].
            sum: [rows, width], may be x's; not written, and 0, without an addend.
            normed: [rows, width].
            rows: of x.
            width: of a row, a multiple of 8 up to 8,192.
            epsilon: added to the mean of the squares.

        Raises:
            BackendError: a size or an address that the kernel cannot take, or the launch failed.
        """
        prepared = self._add_norm(rows, width, epsilon)
        self._launch(ADD_NORM, stream, prepared, (x, addend, weight, sum, normed), () if addend else ("addend", "sum"))

    def silu_multiply(self, stream: Any, *, gate: int, up: int, output: int, values: int) -> None:
        """Launch output = SiLU(gate) · up, SiLU's result rounded before it is multiplied.

        Args:
            stream: as ``Launcher.launch`` takes it.
            gate: [values], at a multiple of 16 bytes as all three.
            up: [values].
            output: [values], may be one of the others.
            values: a multiple of 8.

        Raises:
            BackendError: a size or an address that the kernel cannot take, or the launch failed.
        """
        self._launch(SILU_MULTIPLY, stream, self._silu_multiply(values), (gate, up, output))

    def _launch(
        self, kernel: str, stream: Any, prepared: _Prepared, addresses: tuple[int, ...], absent: tuple[str, ...] = ()
    ) -> None:
        check_addresses(zip(SIGNATURES[kernel].addresses, addresses, strict=True), {}, absent)
        config, loaded, numbers = prepared
        self._launcher.launch(stream, [(config, loaded, *addresses, *numbers)])

    # All of a launch that does not depend on addresses; an int of Python would be passed as 8 bytes.

    def _prepare_add_norm(self, rows: int, width: int, epsilon: float) -> _Prepared:
        config = self._launcher.config(add_norm_launch(rows, width))
        return config, self._kernels[ADD_NORM], (np.int32(width), np.float32(epsilon))

    def _prepare_silu_multiply(self, values: int) -> _Prepared:
        config = self._launcher.config(silu_launch(values))
        return config, self._kernels[SILU_MULTIPLY], (np.int32(values // VECTOR),)
