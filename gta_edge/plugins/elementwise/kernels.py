"""The kernels between matmuls on a GPU: compiled and loaded once, then launched on device addresses.

Knows of no framework. A launch allocates nothing and waits for nothing, so that it can be captured in a CUDA graph.
"""

from __future__ import annotations

from functools import cache
from typing import Any

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
        program = Program(compute)
        self._launcher = Launcher(gpu, "elementwise", KERNELS)
        shared_bytes = {ADD_NORM: add_norm_launch(1, MAX_WIDTH).shared_bytes, SILU_MULTIPLY: 0}
        loaded = self._launcher.load({program: shared_bytes})
        self._kernels = {name: loaded[program, name] for name in program.kernels}

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
        launch = add_norm_launch(rows, width)
        absent = () if addend else ("addend", "sum")
        self._launch(ADD_NORM, stream, launch, (x, addend, weight, sum, normed), absent, width, epsilon)

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
        self._launch(SILU_MULTIPLY, stream, silu_launch(values), (gate, up, output), (), values // VECTOR)

    def _launch(
        self,
        kernel: str,
        stream: Any,
        launch: Any,
        addresses: tuple[int, ...],
        absent: tuple[str, ...],
        number: int,
        *fractions: float,
    ) -> None:
        check_addresses(zip(SIGNATURES[kernel].addresses, addresses, strict=True), {}, absent)
        # An int of Python would be passed as 8 bytes.
        arguments = (*addresses, np.int32(number), *map(np.float32, fractions))
        self._launcher.launch(stream, [(self._launcher.config(launch), self._kernels[kernel], *arguments)])
